"""Text to token ids and back: byte-level BPE trained on the data, and encoding that no text can subvert.

Notable choices:

- A text is only text: `<|endoftext|>` written in a document is encoded like any other characters.
- The trained tokenizer has one special token, end-of-text, which also pads; it round-trips every string.
- It is trained on at most 6 million characters, an equal share from the head of every document.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from dtfcli.data.cache import cache_folder, fingerprint_of, staging
from dtfcli.data.conversations import check_template, conversation_encoder
from dtfcli.data.documents import Document, OnProgress, open_sources, read_documents, take_documents
from dtfcli.data.sources import SourceReport
from dtfcli.errors import ConfigError, DataError
from dtfcli.settings.data import DataSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

Encode = Callable[[list[str]], list[np.ndarray]]

_SAMPLE_CHARACTERS = 6_000_000
_SMALLEST_SHARE = 1_000
_CONTROL_TOKEN = re.compile(r"<.+>|\[[A-Z_]+\]", re.DOTALL)
_PIECE_CHARACTERS = 2**20
_BATCH_CHARACTERS = 2**22
_BATCH_DOCUMENTS = 1024


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the documents: deterministic, and lossless for any text.

    Args:
        documents: Read once; of many or long ones, only an equal share of each is looked at.
        vocab_size: Tokens in all. Text with too few distinct words gives fewer.

    Raises:
        ConfigError: The vocabulary has no room for the 256 bytes and the end-of-text token.
        DataError: There is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise ConfigError(
            f"model.scratch.vocab_size = {vocab_size}: a byte-level tokenizer needs at least "
            f"{len(alphabet) + 1} tokens (every byte and the end of text)."
        )
    sample = _sample(documents)
    if not sample:
        raise DataError("no text to train a tokenizer on: data.sources gave no documents.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    return _wrap(tokenizer)


def data_tokenizer(
    data: DataSettings, *, vocab_size: int, seed: int, on_progress: OnProgress | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer trained on `data.sources`: from the cache as long as text and size stay the same."""
    from tokenizers import Tokenizer

    check_template(data.sources, None)
    if data.streaming:
        raise ConfigError(
            "data.tokenizer is empty: a tokenizer is trained on whole sources, and data.sources stream; name a "
            "tokenizer, or a model.base that has one."
        )
    readers = open_sources(data.sources, on_progress=on_progress)
    identity = {
        "sources": [reader.identity() for reader in readers],
        "vocab_size": vocab_size,
        "max_documents": data.max_documents,
        "seed": seed,
    }
    cached = cache_folder(data) / f"tokenizer-{fingerprint_of(identity)}.json"
    if cached.is_file():
        with suppress(Exception):  # which is what `tokenizers` raises for a damaged file; it is made anew
            return _wrap(Tokenizer.from_file(str(cached)))
    reports = [reader.new_report() for reader in readers]
    texts = read_documents(
        readers,
        reports,
        seed=seed,
        max_documents=data.max_documents,
        on_progress=on_progress,
        message="Reading text for the tokenizer",
    )
    tokenizer = train_tokenizer(texts, vocab_size)
    with suppress(OSError), staging(cached.parent) as folder:  # a cache that cannot be written is none
        (folder / cached.name).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        os.replace(folder / cached.name, cached)
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _sample(documents: Iterable[Document]) -> list[str]:
    """The heads of all documents, cut ever shorter so that together they stay within the limit."""
    share, texts, total = _SAMPLE_CHARACTERS, [], 0
    for document in documents:
        texts.append(document.text[:share])
        total += len(texts[-1])
        while total > _SAMPLE_CHARACTERS:
            if share <= _SMALLEST_SHARE:
                return texts
            share = max(_SMALLEST_SHARE, share * 3 // 4)
            texts = [text[:share] for text in texts]
            total = sum(len(text) for text in texts)
    return texts


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of a fast tokenizer's backend, without truncation and padding; None: it has none."""
    backend: Any = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", None))
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return backend


def text_encoder(tokenizer: PreTrainedTokenizerBase, control_tokens: bool = False) -> Encode:
    """A function from texts to their ids (int32), without special tokens added or, unless asked for, found in the text.

    Tokens that a tokenizer lists as added but not as special (Qwen's `<|fim_prefix|>` and `<tool_call>`) are
    control tokens too; runs of blanks and the like, which some tokenizers add, are ordinary text. The
    caller's tokenizer is left as it is: truncation and padding switched on there have no effect here.
    """
    backend = _plain_backend(tokenizer)
    if backend is None:

        def encode_slowly(texts: list[str]) -> list[np.ndarray]:
            encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=not control_tokens, verbose=False)
            return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

        return encode_slowly

    from tokenizers import AddedToken

    backend.encode_special_tokens = not control_tokens
    if not control_tokens:
        backend.add_special_tokens(
            [
                AddedToken(token.content, special=True, normalized=False)
                for token in backend.get_added_tokens_decoder().values()
                if not token.special and _CONTROL_TOKEN.fullmatch(token.content)
            ]
        )

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    return encode


def document_encoder(
    tokenizer: PreTrainedTokenizerBase, reports: Sequence[SourceReport]
) -> Callable[[Iterable[Document]], Iterator[tuple[Document, np.ndarray]]]:
    """A function from documents to pairs of a document and its tokens, int32 [n], in the same order.

    Args:
        tokenizer: With an end-of-text token and, for conversations, a chat template.
        reports: One per source; tokens are added, and conversations that cannot be used are counted there.
    """

    def refuse(document: Document, reason: str) -> None:
        report = reports[document.source]
        report.documents -= 1
        report.bytes -= document.num_bytes
        report.skip(reason)

    encoders = [text_encoder(tokenizer), text_encoder(tokenizer, control_tokens=True)]
    converse = conversation_encoder(tokenizer, refuse) if tokenizer.chat_template else None
    end_of_text = np.array([tokenizer.eos_token_id], dtype=np.int32)

    def encode_all(documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        remaining = iter(documents)
        while batch := take_documents(remaining, _BATCH_DOCUMENTS, _BATCH_CHARACTERS):
            for document, ids in encode_batch(batch):
                if len(ids):
                    reports[document.source].tokens += len(ids)
                    yield document, ids

    def encode_batch(batch: list[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        pieces = [[] if document.messages else list(split_text(document.text)) for document in batch]
        encoded = []
        for kind, encode in enumerate(encoders):
            of_kind = [each for each, document in zip(pieces, batch, strict=True) if document.control_tokens == kind]
            encoded.append(iter(encode([piece for parts in of_kind for piece in parts])))
        for document, parts in zip(batch, pieces, strict=True):
            if document.messages:
                assert converse is not None, "conversations need a tokenizer with a chat template"
                yield document, converse(document)
            else:
                yield document, np.concatenate([*(next(encoded[document.control_tokens]) for _ in parts), end_of_text])

    return encode_all


def split_text(text: str, limit: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long text into pieces of at most `limit` characters, so that a batch stays small in memory.

    Cuts fall before a single space between two other characters, where byte-level tokenizers begin a new
    word anyway: the ids of the pieces are those of the whole. Only text without such a place is cut inside.
    """
    start = 0
    while len(text) - start > limit:
        cut = text.rfind(" ", start + 1, start + limit)
        while cut > start and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind(" ", start + 1, cut)
        end = cut if cut > start else start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides the ids that a tokenizer gives."""
    backend = _plain_backend(tokenizer)
    if backend is None:
        content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    else:
        content = backend.to_str()
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
