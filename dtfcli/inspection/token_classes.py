"""What kind of token each one is: a class by its text and by the text around it.

Classes are read off the text, not off the vocabulary, so that byte-level and SentencePiece tokenizers give the same
ones. They are a reading aid, not linguistics: "name-like" is any capitalized word that does not begin a sentence.
"""

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

_SENTENCE_END = ".!?…:\n"
_SKIPPED_BACKWARDS = " \t\"'“”‘’«»([{*_—–-"


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
