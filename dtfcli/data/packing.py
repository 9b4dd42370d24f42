"""Documents → split by document → packed blocks of tokens, with what evaluation needs to know about them.

Notable choices:

- The split falls between documents and depends on their content and the seed alone, not on their order;
  exact duplicates stay on one side, so that no held-out text is trained on.
- Each side is one stream of documents in a random but fixed order, an end-of-text token after each, cut into
  blocks of `seq_len`; the tail that fills no block is dropped.
- Tokens pass through a file on their way, so that memory holds one batch of text however large the data.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dtfcli.data.documents import Document, OnProgress, no_document, read_documents, stable_key
from dtfcli.data.sources import SourceReader, SourceReport
from dtfcli.data.stream import document_mixture, read_head
from dtfcli.data.targets import count_targets
from dtfcli.data.tokenizer import document_encoder
from dtfcli.errors import DataError
from dtfcli.settings.data import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INT32 = np.dtype(np.int32)
_HEAD_TOKENS = 2**20
"""Of a stream, what thresholds are calibrated and tokens are counted on."""

Packed = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Blocks of the sides "train" and "validation", int32 [N, seq_len], and notes about them, plain JSON."""


@dataclass(frozen=True)
class _Table:
    """What is known of each document once all are tokenized, in the order in which they came."""

    digests: list[bytes]
    tokens: np.ndarray  # int64 [documents], with the end-of-text token
    bytes: np.ndarray  # int64 [documents], UTF-8


def pack_documents(
    readers: Sequence[SourceReader],
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: DataSettings,
    seed: int,
    folder: Path | None,
    on_progress: OnProgress | None,
) -> Packed:
    """The blocks of both sides and notes about them; with a `folder`, the arrays are files in it."""
    reports = [reader.new_report() for reader in readers]
    texts = read_documents(
        readers,
        reports,
        seed=seed,
        max_documents=data.max_documents,
        on_progress=on_progress,
        message="Tokenizing",
    )
    blocks, text_bytes = {}, {}
    with _scratch(folder, "spool") as spool:
        table = _spool(texts, tokenizer, spool, reports)
        for reader, report in zip(readers, reports, strict=True):
            if not report.documents:  # the chat template refused all of its conversations
                raise no_document(reader, report)
        held_out = split_documents(table.digests, data.validation_fraction, seed)
        _check_enough(table, held_out, data)
        for split, mine in (("train", ~held_out), ("validation", held_out)):
            keys = {int(i): stable_key(table.digests[i], seed, "order") for i in np.flatnonzero(mine)}
            with _scratch(folder, f"{split}.npy") as out:
                text_bytes[split] = _write_blocks(spool, table, sorted(keys, key=keys.__getitem__), data.seq_len, out)
                if folder is None:
                    out.seek(0)
                    blocks[split] = np.load(out)
            if folder is not None:
                blocks[split] = np.load(folder / f"{split}.npy", mmap_mode="r")
    if folder is not None:
        (folder / "spool").unlink()
    targets = np.count_nonzero(blocks["validation"] >= 0)
    bytes_per_token = text_bytes["validation"] / targets if targets else float("nan")
    documents = [int(np.count_nonzero(~held_out)), int(np.count_nonzero(held_out))]
    return blocks, _notes(blocks, bytes_per_token, documents, reports, len(tokenizer))


def pack_head(
    readers: Sequence[SourceReader],
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: DataSettings,
    seed: int,
    folder: Path | None,
    on_progress: OnProgress | None,
) -> Packed:
    """As `pack_documents`, of sources that stream: what is held out for evaluation, and the beginning."""
    reports = [reader.new_report() for reader in readers]
    blocks, documents, bytes_per_token = {}, [], float("nan")
    for split, message in (("train", "Reading the beginning of the stream"), ("validation", "Reading held-out text")):
        held_out = split == "validation"
        count = data.validation_blocks if held_out else max(1, _HEAD_TOKENS // data.seq_len)
        count = 0 if held_out and data.validation_fraction == 0 else count
        mixture = document_mixture(readers, data, seed, held_out=held_out, passes=1)
        progress = partial(on_progress, message) if on_progress is not None else lambda share: None
        rows, number, bytes_per_token = read_head(mixture, tokenizer, reports, data.seq_len, count, progress)
        if count and not len(rows):
            side = "held-out" if held_out else "training"
            remedy = "raise data.validation_fraction, or " if held_out else ""
            raise DataError(
                f"data.seq_len = {data.seq_len}: data.sources gave too little {side} text for one sequence "
                f"({number} documents): {remedy}add text, or set a smaller data.seq_len."
            )
        documents.append(number)
        blocks[split] = rows
        if folder is not None:
            np.save(folder / f"{split}.npy", rows)
            blocks[split] = np.load(folder / f"{split}.npy", mmap_mode="r")
    return blocks, _notes(blocks, bytes_per_token, documents, reports, len(tokenizer))


def _notes(
    blocks: dict[str, np.ndarray],
    bytes_per_token: float,
    documents: list[int],
    reports: Sequence[SourceReport],
    vocab_size: int,
) -> dict[str, Any]:
    """What is known of both sides: fields of `prepare.TokenizedData`.

    Raises:
        DataError: there is validation text, and none of it is a target.
    """
    validation = blocks["validation"]
    if len(validation) and not count_targets(validation):
        raise DataError(
            "data.sources: the held-out rows have no target, so nothing can be validated; raise data.seq_len, so that "
            "answers fit in, or data.validation_fraction."
        )
    return {
        "validation_bytes_per_token": bytes_per_token,
        "validation_unigram": unigram_cross_entropy(blocks["train"], validation, vocab_size),
        "documents": documents,
        "report": [asdict(report) for report in reports],
    }


def _scratch(folder: Path | None, name: str) -> IO[bytes]:
    return io.BytesIO() if folder is None else (folder / name).open("w+b")


def _spool(
    texts: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    spool: IO[bytes],
    reports: Sequence[SourceReport],
) -> _Table:
    """Tokenize everything and write the ids one after the other."""
    digests, tokens, sizes = [], [], []
    for document, ids in document_encoder(tokenizer, reports)(texts):
        spool.write(ids.tobytes())
        digests.append(document.digest)
        tokens.append(len(ids))
        sizes.append(document.num_bytes)
    return _Table(digests, np.array(tokens, dtype=np.int64), np.array(sizes, dtype=np.int64))


def _write_blocks(spool: IO[bytes], table: _Table, order: list[int], seq_len: int, out: IO[bytes]) -> float:
    """Write the documents in this order as an .npy file of whole blocks; returns the bytes of their text.

    A document that the last block cuts counts with the share of its bytes that its tokens have.
    """
    rows = int(table.tokens[order].sum()) // seq_len
    header = {"descr": np.lib.format.dtype_to_descr(_INT32), "fortran_order": False, "shape": (rows, seq_len)}
    np.lib.format.write_array_header_1_0(out, header)
    starts = np.cumsum(table.tokens) - table.tokens
    left, text_bytes = rows * seq_len, 0.0
    for document in order:
        length = int(table.tokens[document])
        taken = min(length, left)
        spool.seek(int(starts[document]) * _INT32.itemsize)
        out.write(spool.read(taken * _INT32.itemsize))
        text_bytes += int(table.bytes[document]) * taken / length
        left -= taken
    out.flush()
    return text_bytes


def split_documents(digests: Sequence[bytes], fraction: float, seed: int) -> np.ndarray:
    """Which documents are held out: bool [documents], a function of contents and seed, not of their order.

    Exactly max(1, round(fraction · n)) of n are held out, copies of one text together. If many copies make that
    impossible, fewer are, or only the text with the fewest copies.

    Raises:
        DataError: There is a single text, which cannot be on both sides.
    """
    if fraction == 0:
        return np.zeros(len(digests), dtype=bool)
    copies = Counter(digests)
    if len(copies) == 1:
        content = "a single document" if len(digests) == 1 else f"{len(digests)} copies of a single document"
        raise DataError(
            f"data.sources gave {content}, and validation text is held out by document: add files, use a .jsonl "
            "with a document per line, or set data.validation_fraction=0."
        )
    left = min(max(1, round(fraction * len(digests))), len(digests) - 1)
    ranked = sorted(copies, key=lambda digest: (stable_key(digest, seed, "split"), digest))
    chosen = set()
    for digest in ranked:
        if copies[digest] <= left:
            chosen.add(digest)
            left -= copies[digest]
    if not chosen:
        chosen.add(min(ranked, key=copies.__getitem__))
    return np.array([digest in chosen for digest in digests], dtype=bool)


def _check_enough(table: _Table, held_out: np.ndarray, data: DataSettings) -> None:
    """Raise unless each side fills a block, with the figures from which the user can choose a remedy."""
    sides = {"training": ~held_out, "validation": held_out} if held_out.any() else {"training": ~held_out}
    tokens = {side: int(table.tokens[mine].sum()) for side, mine in sides.items()}
    if min(tokens.values()) >= data.seq_len:
        return
    counts = {side: int(np.count_nonzero(mine)) for side, mine in sides.items()}
    have = " and ".join(
        f"{tokens[side]} {side} tokens ({counts[side]} document{'s' if counts[side] > 1 else ''})" for side in sides
    )
    remedies = []
    if min(tokens.values()) >= 8:  # the smallest seq_len there is
        remedies.append(f"set data.seq_len to at most {min(tokens.values())}")
    fraction = min(0.5, 1.5 * data.seq_len / sum(tokens.values()))
    if tokens["training"] >= 4 * data.seq_len and fraction > data.validation_fraction:
        remedies.append(f"raise data.validation_fraction to about {fraction:.2g}")
    remedies.append("add text")
    raise DataError(
        f"data.seq_len = {data.seq_len}: data.sources gave only {have}; each side needs a sequence: "
        f"{', '.join(remedies[:-1])}{' or ' * (len(remedies) > 1)}{remedies[-1]}."
    )


def unigram_cross_entropy(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    """Nats per token of a model that has learned nothing but counts.

    -mean over validation tokens v of log((count(v) + 1) / (N + V)), with add-one smoothing, N training tokens
    and V the size of the vocabulary. nan without validation tokens.
    """
    if not validation.size:
        return float("nan")
    held_out = _count(validation, vocab_size)
    trained = _count(train, max(vocab_size, len(held_out)))
    held_out = np.pad(held_out, (0, len(trained) - len(held_out)))
    log_probability = np.log(trained + 1.0) - np.log(trained.sum() + len(trained))
    return float(-(held_out @ log_probability) / held_out.sum())


def _count(blocks: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs as a target: int64 [at least vocab_size], looking at a part of the blocks at a time."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    rows = max(1, 2**24 // blocks.shape[1])
    for start in range(0, len(blocks), rows):
        block = blocks[start : start + rows]
        part = np.bincount(block[block >= 0], minlength=len(counts))
        counts = np.pad(counts, (0, len(part) - len(counts))) + part
    return counts
