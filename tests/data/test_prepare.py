"""Split by document, packing, and the order of training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dtfcli.data import tokenizer as tokenization
from dtfcli.data.documents import Document
from dtfcli.data.order import epoch_order, update_indices
from dtfcli.data.packing import split_documents, unigram_cross_entropy
from dtfcli.data.prepare import prepare_data
from dtfcli.data.tokenizer import data_tokenizer
from dtfcli.errors import DataError
from dtfcli.settings.data import DataSettings
from tests.budget import examples
from tests.data.texts import sentence, source


@given(
    contents=st.lists(st.binary(min_size=1, max_size=1), min_size=2, max_size=60)
    | st.integers(2, 300).map(lambda count: [b"%d" % i for i in range(count)]),
    fraction=st.floats(0.001, 0.99),
    seed=st.integers(-3, 2**40),
    order=st.randoms(use_true_random=False),
)
def test_split_is_exact_ignores_order_and_keeps_copies_together(
    contents: list[bytes], fraction: float, seed: int, order: Any
) -> None:
    if len(set(contents)) == 1:
        contents = [*contents, contents[0] + b"'"]
    held_out = split_documents(contents, fraction, seed)
    assert 0 < held_out.sum() < len(contents)
    sides = dict(zip(contents, held_out, strict=True))
    assert all(sides[content] == side for content, side in zip(contents, held_out, strict=True))
    shuffled = list(contents)
    order.shuffle(shuffled)
    assert list(split_documents(shuffled, fraction, seed)) == [sides[content] for content in shuffled]
    wanted = max(1, round(fraction * len(contents)))
    if 1 in Counter(contents).values():
        assert held_out.sum() <= wanted
    if len(sides) == len(contents):
        assert held_out.sum() == min(wanted, len(contents) - 1), "exact without copies"


def test_split_depends_on_the_seed_and_may_be_none() -> None:
    digests = [b"%d" % i for i in range(100)]
    assert list(split_documents(digests, 0.2, 1)) == list(split_documents(digests, 0.2, 1))
    assert list(split_documents(digests, 0.2, 1)) != list(split_documents(digests, 0.2, 2))
    assert not split_documents(digests, 0, 1).any()
    # Where every text has more copies than may be held out, the one with the fewest is.
    assert list(split_documents([b"a", b"b", b"a", b"b", b"a"], 0.1, 0)) == [False, True, False, True, False]


@pytest.mark.parametrize(("copies", "what"), [(1, "a single document"), (3, "3 copies of a single document")])
def test_single_document_cannot_be_split(tmp_path: Path, make: Any, tokenizer: Any, copies: int, what: str) -> None:
    for i in range(copies):
        (tmp_path / f"{i}.txt").write_text(sentence(1, 500))
    with pytest.raises(DataError, match=rf"gave {what}.*\.jsonl.*data\.validation_fraction=0"):
        prepare_data(make(tmp_path), tokenizer, seed=0)
    assert prepare_data(make(tmp_path, validation_fraction=0.0), tokenizer, seed=0).documents == (copies, 0)


@settings(max_examples=examples(40))
@given(
    lengths=st.lists(st.integers(0, 60), min_size=2, max_size=25),
    seq_len=st.integers(8, 40),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 5),
)
def test_blocks_hold_each_document_once_in_one_piece(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    lengths: list[int],
    seq_len: int,
    fraction: float,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("packing")
    texts = [sentence(i, length) for i, length in enumerate(lengths)]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {"seq_len": seq_len, "validation_fraction": fraction, "cache_dir": str(root / "cache")}
    data = DataSettings.model_validate({"sources": [source(root / "a.jsonl")], **values})
    held_out = split_documents([Document(text).digest for text in texts], fraction, seed)
    encode = tokenization.text_encoder(tokenizer)
    tokens = [len(ids) + 1 for ids in encode(texts)]
    totals = [sum(np.array(tokens)[~held_out]), sum(np.array(tokens)[held_out])]
    if totals[0] < seq_len or (fraction and totals[1] < seq_len):
        with pytest.raises(DataError, match=rf"data\.seq_len = {seq_len}: .*{totals[0]} training tokens"):
            prepare_data(data, tokenizer, seed=seed)
        return
    result = prepare_data(data, tokenizer, seed=seed)
    assert result.documents == (int((~held_out).sum()), int(held_out.sum()))
    assert result.report[0].tokens == sum(tokens)
    for blocks, mine, total in ((result.train, ~held_out, totals[0]), (result.validation, held_out, totals[1])):
        assert blocks.dtype == np.int32
        assert blocks.shape == (total // seq_len, seq_len)
        expected = {text for text, side in zip(texts, mine, strict=True) if side}
        *whole, cut = "".join(tokenizer.decode(blocks.ravel())).split("<|endoftext|>")
        assert len(set(whole)) == len(whole)
        assert set(whole) <= expected
        assert not cut or any(text.startswith(cut) for text in expected - set(whole))


def test_order_of_files_does_not_matter(tmp_path: Path, make: Any, tokenizer: Any) -> None:
    results = []
    for name, order in (("a", range(30)), ("b", reversed(range(30)))):
        (tmp_path / name).mkdir()
        for place, i in enumerate(order):
            (tmp_path / name / f"{place:02}.txt").write_text(sentence(i))
        results.append(prepare_data(make(tmp_path / name), tokenizer, seed=3))
    assert np.array_equal(results[0].train, results[1].train)
    assert np.array_equal(results[0].validation, results[1].validation)


def test_bytes_per_token_counts_what_was_packed(tmp_path: Path, make: Any, tokenizer: Any) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(sentence(i) + " é" * i)
    result = prepare_data(make(tmp_path, validation_fraction=0.5), tokenizer, seed=0)
    text = tokenizer.decode(result.validation.ravel()).replace("<|endoftext|>", "")
    assert result.validation_bytes_per_token == pytest.approx(len(text.encode()) / result.validation.size, rel=0.01)


def test_no_validation_text(folder: Path, make: Any, tokenizer: Any, encodings: list[str]) -> None:
    for _ in range(2):
        result = prepare_data(make(folder, validation_fraction=0.0), tokenizer, seed=0)
        assert result.validation.shape == (0, 16)
        assert result.documents == (20, 0)
        assert np.isnan(result.validation_unigram)
        assert np.isnan(result.validation_bytes_per_token)
    assert len(encodings) == 1


def test_too_little_text_is_explained_with_figures_that_work(folder: Path, make: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data\.seq_len = 2048: .*training tokens \(18 documents\)") as error:
        prepare_data(make(folder, seq_len=2048), tokenizer, seed=0)
    assert "validation tokens (2 documents)" in str(error.value)
    fits = int(str(error.value).split("data.seq_len to at most ")[1].split(" ")[0])
    assert prepare_data(make(folder, seq_len=fits), tokenizer, seed=0).validation.shape == (1, fits)
    with pytest.raises(DataError):
        prepare_data(make(folder, seq_len=fits + 1), tokenizer, seed=0)
    with pytest.raises(DataError, match=r"raise data\.validation_fraction to about") as error:
        prepare_data(make(folder, seq_len=128, validation_fraction=0.01), tokenizer, seed=0)
    fraction = float(str(error.value).split("to about ")[1].split(" ")[0])
    prepare_data(make(folder, seq_len=128, validation_fraction=fraction), tokenizer, seed=0)
    (folder.parent / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"only 2 training tokens \(1 document\).*: add text\.$"):
        prepare_data(make(folder.parent / "a.txt", validation_fraction=0.0), tokenizer, seed=0)


def test_tokenizer_without_end_of_text(folder: Path, make: Any, tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-text token"):
        prepare_data(make(folder), bare, seed=0)


def test_unigram_cross_entropy() -> None:
    train = np.array([[0, 0, 1, 2]], dtype=np.int32)
    validation = np.array([[0, 3], [5, 0]], dtype=np.int32)
    smoothed = np.array([3, 2, 2, 1, 1, 1]) / 10
    assert unigram_cross_entropy(train, validation, 6) == pytest.approx(-np.log(smoothed[[0, 3, 5, 0]]).mean())
    assert unigram_cross_entropy(train, validation, 2) == pytest.approx(unigram_cross_entropy(train, validation, 6)), (
        "ids beyond the vocabulary still count"
    )
    assert np.isnan(unigram_cross_entropy(train, np.empty((0, 2), np.int32), 6))


def test_epoch_order_is_frozen() -> None:
    """Changing the order would silently change every resumed run."""
    assert epoch_order(8, 42, 0).tolist() == [1, 5, 6, 3, 0, 4, 2, 7]
    assert epoch_order(8, 42, 1).tolist() == [3, 0, 6, 4, 1, 7, 2, 5]
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(8, 42, 0)[0] = 1


@given(num_blocks=st.integers(1, 20), per_update=st.integers(1, 45), seed=st.integers(-5, 2**70))
def test_updates_go_through_epochs_without_gaps(num_blocks: int, per_update: int, seed: int) -> None:
    steps = 2 * num_blocks // per_update + 2
    updates = [
        update_indices(step, num_blocks=num_blocks, blocks_per_update=per_update, seed=seed) for step in range(steps)
    ]
    assert all(update.shape == (per_update,) for update in updates)
    flat = np.concatenate(updates)
    for epoch in range(len(flat) // num_blocks):
        assert sorted(flat[epoch * num_blocks : (epoch + 1) * num_blocks]) == list(range(num_blocks))


def test_novels(make: Any, shared_dir: Path) -> None:
    novels = shared_dir / "data/text/novels/validation.parquet"
    data = make(novels, seq_len=1024, validation_fraction=0.4, max_documents=2)
    tokenizer = data_tokenizer(data, vocab_size=512, seed=0)
    assert len(tokenizer) == 512
    result = prepare_data(data, tokenizer, seed=0)
    assert result.documents == (1, 1)
    assert 1.5 < result.validation_bytes_per_token < 4.5
    assert 4.0 < result.validation_unigram < np.log(512)
    assert result.report[0].bytes > 5e5
