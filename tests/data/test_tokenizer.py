"""The tokenizer trained on the data, and encoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dtfcli.data import tokenizer as tokenization
from dtfcli.data.documents import Document
from dtfcli.data.prepare import prepare_data
from dtfcli.data.tokenizer import data_tokenizer, train_tokenizer
from dtfcli.errors import ConfigError, DataError
from tests.budget import examples
from tests.data.texts import VOCABULARY, sentence


def test_trained_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token is None
    assert tokenizer("a")["input_ids"] == tokenizer.encode("a", add_special_tokens=False)
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    again = train_tokenizer((Document(sentence(i)) for i in range(50)), VOCABULARY)
    assert tokenization.tokenizer_identity(again) == tokenization.tokenizer_identity(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenization.tokenizer_identity(loaded) == tokenization.tokenizer_identity(tokenizer)
    assert set(loaded("a")) == {"input_ids", "attention_mask"}
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|endoftext|>", "<|endoftext|>", None)


def test_vocabulary_is_smaller_where_text_is_scarce_and_never_too_small() -> None:
    assert 257 <= len(train_tokenizer([Document("aaaa")], 4096)) < 270
    with pytest.raises(ConfigError, match=r"vocab_size = 256: .* at least 257"):
        train_tokenizer([Document("aaaa")], 256)
    assert len(train_tokenizer([Document("aaaa")], 257)) == 257
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300)


def test_training_reads_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_SAMPLE_CHARACTERS", 10_000)
    read = []

    def many() -> Iterator[Document]:
        for i in range(1_000):
            read.append(i)
            yield Document(f"{'ab' * 1_000} {i}")

    assert len(train_tokenizer(many(), 300)) > 257
    assert len(read) < 20
    # Every document gives its head: so long that all are read, and the last one's word is known.
    texts = [*("ab " * 1_000 for _ in range(9)), "xyz " * 50]
    assert len(train_tokenizer(map(Document, texts), 300).tokenize("xyz")) == 1


def test_text_cannot_inject_control_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import AddedToken

    assert tokenizer.eos_token_id in tokenizer("a<|endoftext|>b")["input_ids"]
    backend = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    qwen = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    plain = ["<|fim_prefix|>", "<tool_call>", "\n\n\n"]
    qwen.add_tokens([AddedToken(token, special=False) for token in plain])
    fim, tool, blanks = (qwen.convert_tokens_to_ids(token) for token in plain)
    text = "a<|endoftext|>b<|fim_prefix|>c<tool_call>d\n\n\ne"
    assert {fim, tool, blanks} <= set(qwen(text)["input_ids"])
    (controlled,) = tokenization.text_encoder(qwen, control_tokens=True)([text])
    assert controlled.tolist() == qwen(text, add_special_tokens=False)["input_ids"]
    (ids,) = tokenization.text_encoder(qwen)([text])
    assert not {qwen.eos_token_id, fim, tool} & set(ids.tolist())
    assert blanks in ids
    assert qwen.decode(ids) == text
    # The caller's tokenizer still sees them.
    assert {fim, tool, blanks, qwen.eos_token_id} <= set(qwen(text)["input_ids"])


def test_encoder_ignores_truncation_and_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50, pad_token="<|endoftext|>")
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    (ids,) = tokenization.text_encoder(other)([sentence(3)])
    assert other.decode(ids) == sentence(3)
    assert tokenization.tokenizer_identity(other) == tokenization.tokenizer_identity(tokenizer)


def test_tokenizer_without_a_fast_backend() -> None:
    class Slow:
        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            assert options["split_special_tokens"]
            assert not options["add_special_tokens"]
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 97}

    (ids,) = tokenization.text_encoder(Slow())(["ab"])
    assert ids.tolist() == [97, 98]
    assert len(tokenization.tokenizer_identity(Slow())) == 32


@settings(max_examples=examples(100))
@given(
    text=st.text(st.sampled_from("ab  \n\té.1'"), max_size=120) | st.text(st.characters(exclude_categories=["Cs"])),
    limit=st.integers(2, 30),
)
def test_any_text_survives_and_its_pieces_encode_like_the_whole(
    tokenizer: PreTrainedTokenizerFast, text: str, limit: int
) -> None:
    encode = tokenization.text_encoder(tokenizer)
    (whole,) = encode([text])
    assert tokenizer.decode(whole) == tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = list(tokenization.split_text(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    starts_well = [
        piece.startswith(" ") and not piece[1:2].isspace() and not before[-1:].isspace()
        for before, piece in itertools.pairwise(pieces)
    ]
    if all(starts_well):
        assert np.concatenate([np.empty(0, np.int32), *encode(pieces)]).tolist() == whole.tolist()


def test_very_long_document(tmp_path: Path, make: Any, tokenizer: Any, recwarn: Any, caplog: Any) -> None:
    novel = " ".join(sentence(i) for i in range(6_000))
    assert len(novel) > 2**20
    (tmp_path / "a.txt").write_text(novel)
    (tmp_path / "b.txt").write_text("x" * 100_000)
    tokenizer.model_max_length = 128
    result = prepare_data(make(tmp_path, validation_fraction=0.0, seq_len=64), tokenizer, seed=0)
    tokens = result.train.ravel()
    end = tokens.tolist().index(tokenizer.eos_token_id)
    texts = {tokenizer.decode(tokens[:end]), tokenizer.decode(tokens[end + 1 :])}
    assert novel in texts or "x" * 100_000 in texts
    assert not recwarn.list
    assert not caplog.records


def test_data_tokenizer_is_cached(folder: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    original = tokenization.train_tokenizer

    def counted(*args: Any) -> Any:
        trained.append(args[1])
        return original(*args)

    monkeypatch.setattr(tokenization, "train_tokenizer", counted)

    def identity(vocab_size: int = 300) -> str:
        return tokenization.tokenizer_identity(data_tokenizer(make(folder), vocab_size=vocab_size, seed=0))

    first = identity()
    assert identity() == first
    assert trained == [300]
    assert identity(280) != first
    (cached, _) = sorted((folder.parent / "cache").glob("tokenizer-*.json"), key=lambda file: -file.stat().st_size)
    cached.write_text("{damaged")
    assert identity() == first
    assert trained == [300, 280, 300]
    (folder / "00.txt").write_text(sentence(99))
    assert identity() != first
    monkeypatch.setattr(tokenization.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    (folder / "00.txt").write_text(sentence(100))
    assert len(data_tokenizer(make(folder), vocab_size=300, seed=0)) == 300
    assert not list((folder.parent / "cache").glob(".building-*"))
