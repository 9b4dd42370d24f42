"""Text of a conversion: rows to fit to and rows of other documents to measure on; no more is read than both need.

Notable choices:

- Rows come from many documents rather than from long stretches of a few, and files are read in turns.
- The split falls between documents. A single long document is cut in two, and the report says so.
- A row begins as the tokenizer begins a text (a BOS token, if it adds one). Short documents share a row.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import Tensor

from dtfcli.data.documents import kept_document, open_sources
from dtfcli.data.hub import HubReader
from dtfcli.data.packing import split_documents
from dtfcli.data.sources import SourceReader
from dtfcli.data.tokenizer import text_encoder
from dtfcli.errors import ConfigError, DataError
from dtfcli.models.stock import longest_text
from dtfcli.settings.data import Source

DEFAULT_TEXT = "HuggingFaceFW/fineweb-edu:sample-10BT"
LENGTH = 256
"""Tokens of a row."""
FIT_TOKENS, MEASURE_TOKENS = 20_000, 8_000
_FIT_PER_UNIT, _LEAST_PER_UNIT = 56, 8
"""Tokens to fit for each unit of the hidden size, where that is more: wanted, and at least."""
_LEAST_ROWS = 4
_EXCERPT = 8192
"""Characters of a stretch of text that a recovery reads."""
_CHARACTERS = 8
"""Of a token, at most, in nearly all text."""
_OPTIONS = {"path": "--text", "name": "--text OWNER/NAME:CONFIG, CONFIG"}


@dataclass(frozen=True)
class Rows:
    """Rows of tokens in random order.

    Attributes:
        ids: int64 [N, T].
        units: int64 [N]; rows of one document have one number, and a row of several documents has its own.
    """

    ids: Tensor
    units: Tensor

    @property
    def tokens(self) -> int:
        """Their number."""
        return self.ids.numel()


@dataclass(frozen=True)
class ConversionText:
    """What a conversion reads.

    Attributes:
        name: as the user gave it; of a file or folder without its place.
        fit, measure: rows of different documents.
        excerpts: of the documents that are not measured, for a recovery; none if none is asked for.
        documents: read, of all rows.
        remark: what a reader of the report should know; empty: nothing.
    """

    name: str
    fit: Rows
    measure: Rows
    excerpts: list[str]
    documents: int
    remark: str


def open_text(name: str | None) -> SourceReader:
    """What `read_text` reads; raises as it does if nothing is there. No text is read yet."""
    return open_sources([Source.named(name or DEFAULT_TEXT, streaming=True)], options=_OPTIONS)[0]


def read_text(name: str | None, tokenizer: Any, config: Any, seed: int, recover: int = 0) -> ConversionText:
    """Read text for a model.

    Args:
        name: file, folder, python-stdlib or data set on the Hub, OWNER/NAME or OWNER/NAME:CONFIG; None: `DEFAULT_TEXT`.
        tokenizer: the model's.
        config: the model's; its hidden size says how much is needed.
        seed: chooses documents and places in them.
        recover: tokens of a recovery.

    Raises:
        DataError, ConfigError: it cannot be read, or is too short.
    """
    length = min(LENGTH, longest_text(config))
    wanted = (wanted_tokens(config), MEASURE_TOKENS)
    try:
        texts, digests = _some_documents(open_text(name), sum(wanted) + recover, seed)
    except (DataError, ConfigError) as error:
        if name is not None:
            raise
        raise type(error)(
            f"--text is not given, and its default, {DEFAULT_TEXT} on the Hub, cannot be read: give a file, a folder "
            "or a data set of yours (--text FILE)."
        ) from error
    remark = ""
    if len(set(digests)) == 1:
        cut = texts[0].rfind(" ", 0, len(texts[0]) * wanted[0] // sum(wanted)) + 1
        sides = [texts[0][:cut]], [texts[0][cut:]]
        remark = "The text is one document: its last part was measured, so the gap may come out too small."
    else:
        held_out = split_documents(digests, wanted[1] / sum(wanted), seed)
        sides = (
            [x for x, out in zip(texts, held_out, strict=True) if not out],
            [x for x, out in zip(texts, held_out, strict=True) if out],
        )
    cutter = _Cutter(tokenizer, length, seed)
    fit, measure = (cutter.rows(side, -(-count // length)) for side, count in zip(sides, wanted, strict=True))
    shown, least = name or DEFAULT_TEXT, max(_LEAST_PER_UNIT * config.hidden_size, _LEAST_ROWS * length)
    if fit.tokens < least or measure.tokens < _LEAST_ROWS * length:
        needed = least * (1 + wanted[1] / wanted[0])
        raise DataError(
            f"--text {shown}: gives {fit.tokens:,} tokens to fit and {measure.tokens:,} to measure; at least {least:,} "
            f"and {_LEAST_ROWS * length:,} are needed, about {needed * 5 / 1000:,.0f} kB of text; give more."
        )
    if fit.tokens < wanted[0]:
        remark += f" {fit.tokens:,} tokens to fit are few for this model: {wanted[0]:,} were wanted."
    remark += _chat_remark(tokenizer, fit.ids)
    excerpts = _excerpts(sides[0], recover * _CHARACTERS, seed)
    if sum(map(len, excerpts)) < 2 * recover:
        remark += " The recovery read its text more than once; give more."
    return ConversionText(
        Path(shown).name if Path(shown).exists() else shown, fit, measure, excerpts, len(set(digests)), remark.strip()
    )


def has_control_tokens(tokenizer: Any) -> bool:
    """Whether text of a conversion is read with control tokens: conversations are text in the chat template."""
    return bool(tokenizer.chat_template)


def _chat_remark(tokenizer: Any, ids: Tensor) -> str:
    """A warning, if the tokenizer has a chat template whose control tokens are nowhere in the text; else nothing."""
    if not has_control_tokens(tokenizer):
        return ""
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    control = {*tokenizer(turn, add_special_tokens=False)["input_ids"]} & {*tokenizer.all_special_ids}
    control -= {tokenizer.unk_token_id}
    if not control or torch.isin(ids, torch.tensor(list(control))).any():
        return ""
    return " The model chats, and the text has no conversations in its template: its answers will be bad; add some."


def wanted_tokens(config: Any) -> int:
    """Tokens to fit a model to."""
    return max(FIT_TOKENS, _FIT_PER_UNIT * config.hidden_size)


def _some_documents(reader: SourceReader, tokens: int, seed: int) -> tuple[list[str], list[bytes]]:
    """Different documents from all shards in turns, until a row from each long one gives so many tokens."""
    report, left, kept = reader.new_report(), tokens * _CHARACTERS, dict[bytes, str]()
    order = np.random.RandomState(seed).permutation(reader.num_shards)
    waiting = (reader.open_shard(int(index), None, report) for index in order)
    # Each open shard holds a file open, and of the Hub it is a download.
    shards: deque[Iterator[Any]] = deque(islice(waiting, 1 if isinstance(reader, HubReader) else 32))
    while shards and left > 0:
        shard = shards.popleft()
        row = next(shard, _END)
        if row is _END:
            shards.extend(islice(waiting, 1))
            continue
        shards.append(shard)
        document = kept_document(0, reader, row, report, seed)
        if document is not None and document.digest not in kept:
            kept[document.digest] = document.text
            left -= min(len(document.text), LENGTH * _CHARACTERS)
    pyarrow.default_memory_pool().release_unused()  # it keeps what a file took
    if not kept:
        raise DataError(f"{reader.label}: no document to use; add files with text.")
    return list(kept.values()), list(kept)


_END = object()


def _excerpts(texts: Sequence[str], characters: int, seed: int) -> list[str]:
    """Stretches of texts in random order, short texts whole, with so many characters; as few as possible of each."""
    quota, random, longest = 1, np.random.RandomState(seed), max(map(len, texts), default=0)
    found: list[str] = []
    while characters and sum(map(len, found)) < characters:
        found = [part for text in texts for part in _stretches(text, quota, _EXCERPT, random)]
        if quota * _EXCERPT >= longest:
            break
        quota *= 2
    return [found[place] for place in random.permutation(len(found))]


def _stretches(text: str, quota: int, room: int, random: np.random.RandomState) -> Iterator[str]:
    """Of a long text one stretch from each of `quota` equal parts, each from the beginning of a word; a short one."""
    if len(text) <= quota * room:
        yield text
        return
    part = (len(text) - room) / quota
    for number in range(quota):
        start = int((number + random.random_sample()) * part)
        space = text.find(" ", start, start + room // 4)
        yield text[max(start, space) : start + room]


class _Cutter:
    """Texts → rows of tokens."""

    def __init__(self, tokenizer: Any, length: int, seed: int) -> None:
        self._encode: Callable[[list[str]], list[np.ndarray]] = text_encoder(tokenizer, has_control_tokens(tokenizer))
        begins = tokenizer("a")["input_ids"][:1]
        self._begin = begins if begins == [tokenizer.bos_token_id] else []
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._body = length - len(self._begin)
        self._random = np.random.RandomState(seed)

    def rows(self, texts: Sequence[str], wanted: int) -> Rows:
        """At most so many rows, as few as possible of each text."""
        quota, longest = 1, max(map(len, texts), default=0)
        found = list(self._cut(texts, quota))
        while len(found) < wanted and quota * self._body * _CHARACTERS < longest:
            quota *= 2
            found = list(self._cut(texts, quota))
        chosen = self._random.permutation(len(found))[:wanted]
        ids = [[*self._begin, *found[place][1]] for place in chosen]
        units = [found[place][0] for place in chosen]
        return Rows(torch.tensor(ids, dtype=torch.long), torch.tensor(units, dtype=torch.long))

    def _cut(self, texts: Sequence[str], quota: int) -> Iterator[tuple[int, Any]]:
        """Units and rows; `quota`: of each long text."""
        room = self._body * _CHARACTERS
        pending: list[int] = []
        for unit, text in enumerate(texts):
            if len(text) > quota * room:
                for ids in self._encode(list(_stretches(text, quota, room, self._random))):
                    if len(ids) >= self._body:
                        yield unit, ids[: self._body]
                continue
            (ids,) = self._encode([text])
            if len(ids) >= self._body:
                yield from ((unit, part) for part in ids[: len(ids) // self._body * self._body].reshape(-1, self._body))
                continue
            pending += [*ids.tolist(), *self._end]
            if len(pending) >= self._body:
                yield unit, pending[: self._body]
                pending = []
