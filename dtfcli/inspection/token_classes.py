"""What kind of token each one is: a class by its text and what stands around it, and its part of speech in Python.

Classes are read off the text, not off the vocabulary, so that byte-level and SentencePiece tokenizers give the same
ones. They are a reading aid, not linguistics: "name-like" is any capitalized word that does not begin a sentence.
"""

import bisect
import builtins
import io
import keyword
import tokenize as python_tokens
import unicodedata
from collections.abc import Sequence

from dtfcli.inspection.tokens import TokenizedText

CLASSES = (
    "word start",
    "word continuation",
    "name-like",
    "number",
    "punctuation",
    "newline",
    "space",
    "character part",
    "special",
)
"""Every token has exactly one.

- special: added by the tokenizer.
- character part: a later token of a character that is spread over several.
- newline, space: nothing but white space, with a line end or without.
- number: letters and digits of a run that begins with a digit, such as the tokens of "1914", "3.5e10" or "2nd".
- punctuation: no letter and no digit.
- word continuation: its first letter or digit continues a word of an earlier token.
- name-like: begins a capitalized word in the middle of a sentence.
- word start: begins any other word.
"""

PYTHON_CLASSES = ("keyword", "identifier", "builtin", "number", "string", "comment", "operator", "layout")
"""Of a token in Python source, by its first character that is not white space; layout: white space alone."""

_SENTENCE_END = ".!?…:\n"
_SKIPPED_BACKWARDS = " \t\"'“”‘’«»([{*_—–-"
_STRINGS = {
    python_tokens.STRING,
    *(
        getattr(python_tokens, f"{kind}STRING_{part}")
        for kind in "FT"
        for part in ("START", "MIDDLE", "END")
        if hasattr(python_tokens, f"{kind}STRING_{part}")
    ),
}


def classify(tokens: TokenizedText) -> list[str]:
    """One of `CLASSES` for each token."""
    begins = _word_begins(tokens.text)
    return [
        "special" if special else _classify(tokens.text, begins, start, piece)
        for piece, start, special in zip(tokens.pieces, tokens.starts, tokens.special, strict=True)
    ]


def _classify(text: str, begins: Sequence[int], start: int, piece: str) -> str:
    if not piece:
        return "character part"
    if piece.isspace():
        return "newline" if "\n" in piece or "\r" in piece else "space"
    first = next((i for i, c in enumerate(piece, start) if c.isalnum()), None)
    if first is None:
        return "punctuation"
    begin = begins[first]
    if text[begin].isdigit():
        return "number"
    if begin < start:
        return "word continuation"
    return "name-like" if text[begin].isupper() and not _begins_sentence(text, begin) else "word start"


def _word_begins(text: str) -> list[int]:
    """For each letter or digit the place of the first one of its word.

    Underscores and combining marks are inside a word, as are an apostrophe between letters and a point or comma
    between digits.
    """
    begins: list[int] = []
    begin = -1
    for i, c in enumerate(text):
        if c.isalnum():
            begin = i if begin < 0 else begin
        elif begin >= 0 and c != "_" and not unicodedata.category(c).startswith("M"):
            around = text[i - 1 : i] + text[i + 1 : i + 2]
            apostrophe = c in "'’" and len(around) == 2 and around.isalpha()
            point = c in ".," and len(around) == 2 and around.isdigit()
            begin = begin if apostrophe or point else -1
        begins.append(begin)
    return begins


def _begins_sentence(text: str, place: int) -> bool:
    """Whether nothing, or the end of a sentence or line, stands before a word (quotes and brackets skipped)."""
    while place > 0 and text[place - 1] in _SKIPPED_BACKWARDS:
        place -= 1
    return place == 0 or text[place - 1] in _SENTENCE_END


def classify_python(tokens: TokenizedText) -> list[str] | None:
    """One of `PYTHON_CLASSES` for each token of a Python source, or None where Python itself cannot read it."""
    try:
        marks = _python_marks(tokens.text)
    except (python_tokens.TokenError, SyntaxError, ValueError):
        return None
    places = [place for place, _ in marks]
    result = []
    for piece, start, special in zip(tokens.pieces, tokens.starts, tokens.special, strict=True):
        lead = len(piece) - len(piece.lstrip())
        at = bisect.bisect_right(places, start + lead) - 1
        inside = _inside(marks, at)
        if special or (not piece.strip() and inside != "string"):
            result.append("layout")
        else:
            result.append(inside)
    return result


def _inside(marks: Sequence[tuple[int, str]], at: int) -> str:
    return marks[at][1] if at >= 0 else "layout"


def _python_marks(text: str) -> list[tuple[int, str]]:
    """Places in the text where a Python token begins, and where layout begins after one; in order."""
    lines = [0]
    for line in io.StringIO(text, newline=""):
        lines.append(lines[-1] + len(line))
    marks: list[tuple[int, str]] = [(0, "layout")]
    for token in python_tokens.generate_tokens(io.StringIO(text, newline="").readline):
        begin = lines[min(token.start[0] - 1, len(lines) - 1)] + token.start[1]
        end = lines[min(token.end[0] - 1, len(lines) - 1)] + token.end[1]
        if end > begin:
            marks += [(begin, _python_class(token)), (end, "layout")]
    return sorted(marks, key=lambda mark: mark[0])


def _python_class(token: python_tokens.TokenInfo) -> str:
    if token.type == python_tokens.NAME:
        if keyword.iskeyword(token.string):
            return "keyword"
        return "builtin" if hasattr(builtins, token.string) else "identifier"
    if token.type in _STRINGS:
        return "string"
    kinds = {python_tokens.NUMBER: "number", python_tokens.COMMENT: "comment", python_tokens.OP: "operator"}
    return kinds.get(token.type, "layout")
