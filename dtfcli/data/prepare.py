"""`data.sources` → blocks of tokens: read, split, tokenized and packed, or found in the cache of an earlier time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtfcli.data import cache
from dtfcli.data.conversations import check_template
from dtfcli.data.documents import OnProgress, open_sources
from dtfcli.data.packing import Packed, pack_documents, pack_head
from dtfcli.data.sources import SourceReader, SourceReport
from dtfcli.data.stream import stream_identity
from dtfcli.data.tokenizer import tokenizer_identity
from dtfcli.errors import DataError
from dtfcli.settings.data import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedData:
    """Both sides of a text as blocks of tokens, and what evaluation needs to know about them."""

    # int32 [N, seq_len], usually a read-only memory map; `targets` says which tokens are none. Of a stream, whose rows
    # `RowStream` gives while training, it is the beginning.
    train: np.ndarray
    validation: np.ndarray  # int32 [M, seq_len]; M = 0 where data.validation_fraction = 0
    validation_bytes_per_token: float  # UTF-8 bytes of the held-out text per token; nan without any
    validation_unigram: float  # nats per token under training-text frequencies; nan without any
    documents: tuple[int, int]  # training, validation
    report: tuple[SourceReport, ...]  # one per source
    fingerprint: str


def prepare_data(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    on_progress: OnProgress | None = None,
) -> TokenizedData:
    """Read, split, tokenize and pack `data.sources`, or open the result of an earlier time.

    Args:
        data: The settings `data.*`.
        tokenizer: With an end-of-text token, which is put after every document.
        seed: Decides the split, the order of documents and what a `ratio` keeps.
        on_progress: Called with a message and the share done (None where that is unknown).

    Returns:
        The blocks of both sides. They are memory maps of the cache; arrays where it cannot be written.

    Raises:
        ConfigError: A source has a setting that nothing reads.
        DataError: A source cannot be read, or there is too little text for the settings.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer '{tokenizer.name_or_path}' has no end-of-text token to put between documents: "
            "set eos_token in its tokenizer_config.json, or data.tokenizer to another one."
        )
    check_template(data.sources, tokenizer)
    readers = open_sources(data.sources, on_progress=on_progress)
    fingerprint = cache.fingerprint_of(_identity(readers, tokenizer, data, seed))
    root = cache.cache_folder(data)
    cached = _open_cached(root / fingerprint, fingerprint)
    if cached is not None:
        if on_progress is not None:
            on_progress("Tokenized text found in the cache", 1.0)
        return cached

    def pack(folder: Path | None) -> Packed:
        pack_side = pack_head if data.streaming else pack_documents
        return pack_side(readers, tokenizer, data=data, seed=seed, folder=folder, on_progress=on_progress)

    try:
        with cache.staging(root) as folder:
            blocks, notes = pack(folder)
            cache.seal(folder, fingerprint, blocks, notes)
            del blocks  # a folder with open maps cannot be renamed everywhere
            cache.publish(folder, root / fingerprint, fingerprint)
        cached = _open_cached(root / fingerprint, fingerprint)
        if cached is not None:
            return cached
        problem = "what was written cannot be read back"
    except OSError as error:  # sources raise DataError, so this is the cache
        problem = error.strerror or str(error)
    warning = f"Tokenized text is not cached: {root}: {problem}; set data.cache_dir to a writable folder."
    if on_progress is not None:
        on_progress(warning, None)
    else:
        _log.warning(warning)
    return _tokenized(pack(None), fingerprint)


def _identity(
    readers: Sequence[SourceReader], tokenizer: PreTrainedTokenizerBase, data: DataSettings, seed: int
) -> dict[str, Any]:
    """All that decides the blocks; plain JSON."""
    identity = {
        "sources": [reader.identity() for reader in readers],
        "tokenizer": tokenizer_identity(tokenizer),
        "end_of_text": tokenizer.eos_token_id,
        "seq_len": data.seq_len,
        "validation_fraction": data.validation_fraction,
        "max_documents": data.max_documents,
        "seed": seed,
    }
    if any(source.messages_field for source in data.sources):
        identity["chat_template"] = str(tokenizer.chat_template)
    return identity | (stream_identity(data) if data.streaming else {})


def _open_cached(folder: Path, fingerprint: str) -> TokenizedData | None:
    packed = cache.load(folder, fingerprint)
    return None if packed is None else _tokenized(packed, fingerprint)


def _tokenized(packed: Packed, fingerprint: str) -> TokenizedData:
    blocks, notes = packed
    train, validation = notes["documents"]
    reports = tuple(SourceReport(**report) for report in notes["report"])
    return TokenizedData(
        **{**blocks, **notes, "documents": (train, validation), "report": reports}, fingerprint=fingerprint
    )
