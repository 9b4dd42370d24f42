"""A text and its tokens, each with its place in the text.

Notable choices:

- Tokens are shown as the stretch of text that they cover, not as what decoding them one by one gives: a character
  that is spread over several tokens (an emoji in a byte-level vocabulary) belongs to the first of them, and the others
  cover nothing.
- Text between tokens, which a tokenizer dropped, is kept as the gap in front of the next one, so that pieces and gaps
  joined are the text again.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dtfcli.errors import ConfigError

_SURROGATES = re.compile("[\ud800-\udfff]")
_LEADING_SPACE = ("Ġ", "Ċ", "ĉ", "▁", " ")
"""How byte-level and SentencePiece vocabularies begin a token that starts with white space."""
_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn")
_JOINERS = "\u200c\u200d\ufe0f"
"""Format characters that emoji and scripts are written with."""


@dataclass(frozen=True)
class TokenizedText:
    """A text, cut into tokens.

    Attributes:
        text: as it was tokenized; lone surrogates are U+FFFD.
        ids: token ids.
        pieces: the stretch of text of each token; "" for the later tokens of a character that is spread over several.
        gaps: text in front of each piece that belongs to no token.
        starts: where each piece begins in the text, in characters.
        special: tokens that the tokenizer added; their piece is their name and no part of the text.
        tail: text after the last piece.
    """

    text: str
    ids: list[int]
    pieces: list[str]
    gaps: list[str]
    starts: list[int]
    special: list[bool]
    tail: str

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenizedText:
    """Cut a text into the tokens that a model sees.

    Raises:
        ConfigError: the text has no tokens.
    """
    text = _SURROGATES.sub("\ufffd", text)
    fast = bool(getattr(tokenizer, "is_fast", False))
    options: dict[str, Any] = {"return_offsets_mapping": True} if fast else {}
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False, **options)
    ids: list[int] = list(encoded["input_ids"])
    if not ids:
        raise ConfigError("the text is empty: give a TEXT or --file.")
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    spans = encoded["offset_mapping"] if fast else _spans_by_decoding(tokenizer, ids, text)
    added = [
        bool(mask) and start == end for mask, (start, end) in zip(encoded["special_tokens_mask"], spans, strict=True)
    ]
    pieces, gaps, starts, covered = [], [], [], 0
    for name, (start, end), special in zip(names, spans, added, strict=True):
        start, end = (covered, covered) if special else (max(start, covered), max(end, covered))
        if text[covered:start].isspace() and name.startswith(_LEADING_SPACE):
            start = covered  # some tokenizers trim the space off the offsets, not off the token
        gaps.append(text[covered:start])
        pieces.append(name if special else text[start:end])
        starts.append(start)
        covered = end
    return TokenizedText(text, ids, pieces, gaps, starts, added, text[covered:])


def _spans_by_decoding(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[tuple[int, int]]:
    """Offsets for a tokenizer that knows none: each decoded token is searched after the one before it."""
    spans: list[tuple[int, int]] = []
    place, characters = 0, list[int]()  # tokens of a character that is not complete yet
    for token in ids:
        characters.append(token)
        piece = str(tokenizer.decode(characters, clean_up_tokenization_spaces=False))
        stop = place
        if not piece.endswith("\ufffd"):
            piece = piece.strip() or piece
            start, characters = text.find(piece, place), []
            stop = place if start < 0 else start + len(piece)
        spans.append((place, stop))
        place = stop
    return spans


def visible(text: str) -> str:
    """A text with control, format and unassigned characters made visible, so that it cannot steer a terminal or page.

    Line ends, tabs and the joiners of emoji and scripts stay.
    """
    return "".join(_visible(c) for c in text) if not text.isascii() or not text.isprintable() else text


def _visible(character: str) -> str:
    if character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _UNSEEN:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨{code:04X}⟩"


def short(text: str) -> str:
    """A token on one line, quoted where its edges matter: line ends ⏎, tabs ⇥, nothing …"""
    if not text:
        return "…"
    shown = visible(text).replace("\n", "⏎").replace("\t", "⇥")
    return shown.replace(" ", "·") if text.isspace() else shown.replace(" ", "·", len(shown) - len(shown.lstrip(" ")))
