"""Tokens with their places, and their classes, on tricky texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dtfcli.inspection.token_classes import CLASSES, classify
from dtfcli.inspection.tokens import TokenizedText, short, tokenize, visible
from tests.budget import examples

TRICKY = [
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family",
    "שלום world",
    "a\u0301e\u0308",
    "\u202eevil",
    "\x00\x1b[31m",
    "x\ud800y",
    "\r\n\t  ",
]


def _joined(tokens: TokenizedText) -> str:
    pieces = ["" if special else piece for piece, special in zip(tokens.pieces, tokens.special, strict=True)]
    return "".join(gap + piece for gap, piece in zip(tokens.gaps, pieces, strict=True)) + tokens.tail


@pytest.fixture(scope="module", params=["words", "byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each kind of tokenizer."""
    return request.getfixturevalue(request.param)


@settings(max_examples=examples(150))
@given(text=st.one_of(st.sampled_from(TRICKY), st.text(min_size=1, max_size=60)).filter(lambda t: t.strip()))
def test_pieces_and_gaps_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenize(tokenizer, text)
    assert _joined(tokens) == tokens.text
    assert tokens.text == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    classes = classify(tokens)
    assert len(classes) == len(tokens)
    assert set(classes) <= set(CLASSES)
    for piece, kind in zip(tokens.pieces, classes, strict=True):
        assert (kind == "character part") == (piece == "")
        assert (kind in ("newline", "space")) == (piece != "" and piece.isspace())
    shown = visible(tokens.text)
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_a_character_spread_over_tokens_is_shown_whole(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = tokenize(byte_level, "é 👍!")
    assert [piece for piece in tokens.pieces if piece] == ["é", " ", "👍", "!"]
    assert tokens.pieces.count("") == len(tokens) - 4
    assert len(tokens) == 2 + 1 + 4 + 1


def test_a_tokenizer_without_offsets(byte_level: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the cat, é 👍 did"
    fast = tokenize(byte_level, text)
    monkeypatch.setattr(type(byte_level), "is_fast", property(lambda self: False))
    slow = tokenize(byte_level, text)
    assert _joined(slow) == text
    assert slow.ids == fast.ids
    assert [p.strip() for p in slow.pieces if p.strip()] == [p.strip() for p in fast.pieces if p.strip()]


def _by_word(text: str) -> dict[str, str]:
    """Class of each letter run, digit run, space and mark, cut by hand."""
    pieces, starts, place = [], [], 0
    for piece in text.split("|"):
        pieces.append(piece)
        starts.append(place)
        place += len(piece)
    n = len(pieces)
    tokens = TokenizedText("".join(pieces), list(range(n)), pieces, [""] * n, starts, [False] * n, "")
    return dict(zip(pieces, classify(tokens), strict=True))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("The| cat| sat|.", {"The": "word start", " cat": "word start", ".": "punctuation"}),
        ("He| met| Anna|.| She", {" Anna": "name-like", " She": "word start"}),
        ("run|ning| don|'t", {"ning": "word continuation", " don": "word start", "'t": "word continuation"}),
        ("in| 19|14|,| 3|.|5", {" 19": "number", "14": "number", ".": "punctuation", "5": "number"}),
        ("x|1| foo|_bar", {"1": "word continuation", "_bar": "word continuation"}),
        ("a|\n|  |b", {"\n": "newline", "  ": "space", "b": "word start"}),
        ("“|Yes|,”| said| Paul", {"Yes": "word start", ",”": "punctuation", " Paul": "name-like"}),
        ("e\u0301|te", {"te": "word continuation"}),
    ],
)
def test_classes(cut: str, expected: dict[str, str]) -> None:
    found = _by_word(cut)
    assert {piece: found[piece] for piece in expected} == expected


def test_short() -> None:
    assert short(" the") == "·the"
    assert short("\n  ") == "⏎··"
    assert short("") == "…"
    assert short("\x1b[0m") == "␛[0m"
