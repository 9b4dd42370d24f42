"""Tokenized text on disk: reused, replaced, repaired."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtfcli.data import cache as token_cache
from dtfcli.data import files, packing
from dtfcli.data.documents import Document
from dtfcli.data.prepare import TokenizedData, prepare_data
from dtfcli.data.tokenizer import train_tokenizer
from dtfcli.settings.data import DataSettings
from tests.data.texts import VOCABULARY, sentence


def cached_folder(data: DataSettings, result: TokenizedData) -> Path:
    return Path(data.cache_dir) / result.fingerprint


def test_cache_is_reused(folder: Path, make: Any, tokenizer: Any, encodings: list[str]) -> None:
    data = make(folder)
    first = prepare_data(data, tokenizer, seed=0)
    messages: list[str] = []
    second = prepare_data(data, tokenizer, seed=0, on_progress=lambda message, _: messages.append(message))
    assert len(encodings) == 1
    assert messages == ["Tokenized text found in the cache"]
    assert isinstance(first.train, np.memmap)
    assert isinstance(second.train, np.memmap)
    assert not second.train.flags.writeable
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.validation, second.validation)
    assert first.report == second.report
    assert (first.documents, first.fingerprint) == (second.documents, second.fingerprint)
    assert first.validation_unigram == second.validation_unigram
    assert sorted(file.name for file in Path(data.cache_dir).iterdir()) == [first.fingerprint]
    assert sorted(file.name for file in cached_folder(data, first).iterdir()) == [
        "meta.json",
        "train.npy",
        "validation.npy",
    ]


@pytest.mark.parametrize("by_content", [True, False])
def test_cache_follows_the_files(
    folder: Path, make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, by_content: bool
) -> None:
    if not by_content:
        monkeypatch.setattr(files, "_HASH_CONTENT_UP_TO", 0)
    seen = {prepare_data(make(folder), tokenizer, seed=0).fingerprint}

    def check_new() -> None:
        fingerprint = prepare_data(make(folder), tokenizer, seed=0).fingerprint
        assert fingerprint not in seen
        seen.add(fingerprint)

    file = folder / "05.txt"
    file.write_text(sentence(5).replace("Text", "Tixt"))
    os.utime(file, ns=(1, 1))
    check_new()
    file.write_text(sentence(5) + "!")
    check_new()
    (folder / "new.txt").write_text("new")
    check_new()
    file.rename(folder / "renamed.txt")
    check_new()
    os.utime(folder / "06.txt", ns=(2, 2))
    if by_content:
        assert prepare_data(make(folder), tokenizer, seed=0).fingerprint in seen
    else:
        check_new()


def test_cache_follows_the_settings(folder: Path, make: Any, tokenizer: Any, encodings: list[str]) -> None:
    other = train_tokenizer((Document(sentence(i)) for i in range(30, 60)), VOCABULARY)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": sentence(i), "body": sentence(i + 1)}) + "\n" for i in range(100, 110))
    )
    data = make(folder)
    results = [
        prepare_data(data, tokenizer, seed=0),
        prepare_data(data, tokenizer, seed=1),
        prepare_data(data, other, seed=0),
        prepare_data(make(folder, seq_len=24), tokenizer, seed=0),
        prepare_data(make(folder, validation_fraction=0.2), tokenizer, seed=0),
        prepare_data(make(folder, max_documents=15), tokenizer, seed=0),
        prepare_data(make(folder, source={"ratio": 0.7}), tokenizer, seed=0),
        prepare_data(make(folder, source={"text_field": "body"}), tokenizer, seed=0),
        prepare_data(make(sources=[*data.sources, *data.sources]), tokenizer, seed=0),
    ]
    assert len({result.fingerprint for result in results}) == len(results)
    assert len(encodings) == len(results)
    assert results[5].documents == (13, 2)
    assert results[8].documents == (54, 6)


def test_cache_does_not_depend_on_the_working_folder(
    folder: Path, make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_data(make(folder), tokenizer, seed=0)
    monkeypatch.chdir(folder.parent)
    assert prepare_data(make("texts"), tokenizer, seed=0).fingerprint == first.fingerprint


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["train.npy", "validation.npy", "meta.json"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"garbage" * 50),
        lambda file: file.write_bytes(file.read_bytes()[:-10]),
        lambda file: file.write_text("[]"),
        flip,
    ],
    ids=["missing", "empty", "garbage", "truncated", "other", "flipped"],
)
def test_damaged_cache_is_rebuilt(
    folder: Path, make: Any, tokenizer: Any, encodings: list[str], name: str, damage: Callable[[Path], Any]
) -> None:
    data = make(folder)
    first = prepare_data(data, tokenizer, seed=0)
    train, validation = np.array(first.train), np.array(first.validation)
    file = cached_folder(data, first) / name
    content = file.read_bytes()
    damage(file)
    again = prepare_data(data, tokenizer, seed=0)
    assert len(encodings) == 2
    assert np.array_equal(again.train, train)
    assert np.array_equal(again.validation, validation)
    assert file.read_bytes() == content
    assert [entry.name for entry in Path(data.cache_dir).iterdir()] == [first.fingerprint]
    prepare_data(data, tokenizer, seed=0)
    assert len(encodings) == 2


def test_file_in_the_place_of_a_cached_folder(folder: Path, make: Any, tokenizer: Any) -> None:
    data = make(folder)
    first = prepare_data(data, tokenizer, seed=0)
    train = np.array(first.train)
    place = cached_folder(data, first)
    place.rename(place.with_name("elsewhere"))
    place.write_text("a file")
    again = prepare_data(data, tokenizer, seed=0)
    assert place.is_dir()
    assert np.array_equal(again.train, train)


def test_cache_that_cannot_be_written(folder: Path, make: Any, tokenizer: Any, caplog: Any) -> None:
    (folder.parent / "file").write_text("in the way")
    expected = prepare_data(make(folder), tokenizer, seed=0)
    data = make(folder, cache_dir=str(folder.parent / "file" / "cache"))
    messages: list[tuple[str, float | None]] = []
    result = prepare_data(data, tokenizer, seed=0, on_progress=lambda *message: messages.append(message))
    assert not isinstance(result.train, np.memmap)
    assert np.array_equal(result.train, expected.train)
    assert np.array_equal(result.validation, expected.validation)
    assert result.validation_unigram == expected.validation_unigram
    assert result.report == expected.report
    warning = next(message for message, _ in messages if "not cached" in message)
    assert "data.cache_dir" in warning
    assert not caplog.records
    prepare_data(data, tokenizer, seed=0)
    assert "Tokenized text is not cached" in caplog.text


def test_disk_full_while_writing(folder: Path, make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "seal", full)
    messages: list[str] = []
    data = make(folder)
    result = prepare_data(data, tokenizer, seed=0, on_progress=lambda message, _: messages.append(message))
    assert len(result.train)
    assert any("No space left on device" in message for message in messages)
    assert list(Path(data.cache_dir).iterdir()) == []


def test_interrupted_build_leaves_nothing(
    folder: Path, make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    data = make(folder)
    monkeypatch.setattr(packing, "_write_blocks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(data, tokenizer, seed=0)
    assert list(Path(data.cache_dir).iterdir()) == []


def test_leftovers_of_killed_processes_are_removed(folder: Path, make: Any, tokenizer: Any) -> None:
    data = make(folder)
    old, young = (Path(data.cache_dir) / f".building-{name}" for name in ("old", "young"))
    for leftover in (old, young):
        leftover.mkdir(parents=True)
        (leftover / "spool").write_bytes(b"1234")
    os.utime(old, (1, 1))
    prepare_data(data, tokenizer, seed=0)
    assert not old.exists()
    assert young.exists()


def test_racing_builds_agree(folder: Path, make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds nothing, each builds, and the last to finish meets the other's result."""
    both_built = threading.Barrier(2, timeout=30)
    seal = token_cache.seal

    def seal_together(*args: Any) -> None:
        seal(*args)
        both_built.wait()

    monkeypatch.setattr(token_cache, "seal", seal_together)
    results: list[TokenizedData] = []
    data = make(folder)
    workers = [threading.Thread(target=lambda: results.append(prepare_data(data, tokenizer, seed=0))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 2
    assert np.array_equal(results[0].train, results[1].train)
    assert [entry.name for entry in Path(data.cache_dir).iterdir()] == [results[0].fingerprint]


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cache_folder(**values: Any) -> Path:
        return token_cache.cache_folder(DataSettings(**values))

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "dtf" / "tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dtf" / "tokens"
    assert cache_folder(cache_dir="~/c") == tmp_path / "c"


def test_checksum_of_large_arrays_looks_at_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_CHECKED_BYTES", 64)
    monkeypatch.setattr(token_cache, "_CHECKED_PLACES", 8)
    blocks = np.arange(4096, dtype=np.int32).reshape(64, 64)
    before = token_cache.checksum(blocks)
    for place in (0, -1):
        changed = blocks.copy()
        changed.flat[place] += 1
        assert token_cache.checksum(changed) != before
