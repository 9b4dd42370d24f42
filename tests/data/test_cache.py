"""Tokenized text on disk: reused, replaced, repaired."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtfcli.data import cache as token_cache
from dtfcli.data import files
from dtfcli.data.documents import Document
from dtfcli.data.prepare import TokenizedData, prepare_data
from dtfcli.data.tokenizer import train_tokenizer
from dtfcli.settings.data import DataSettings
from tests.data.texts import VOCABULARY, sentence


def stored(data: DataSettings) -> dict[str, bytes]:
    """The files of the cache."""
    root = Path(data.cache_dir)
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def assert_same(first: TokenizedData, second: TokenizedData) -> None:
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.validation, second.validation)
    assert (first.report, first.documents) == (second.report, second.documents)
    assert first.validation_unigram == second.validation_unigram


def test_cache_is_reused(folder: Path, make: Any, tokenizer: Any, encodings: list[str]) -> None:
    data = make(folder)
    first = prepare_data(data, tokenizer, seed=0)
    messages: list[str] = []
    second = prepare_data(data, tokenizer, seed=0, on_progress=lambda message, _: messages.append(message))
    assert len(encodings) == 1
    assert messages == ["Tokenized text found in the cache"]
    for blocks in (first.train, second.train, first.validation, second.validation):
        assert isinstance(blocks, np.memmap)
        assert not blocks.flags.writeable
    assert_same(first, second)
    assert first.fingerprint == second.fingerprint
    assert set(stored(data)) == {f"{first.fingerprint}/{name}" for name in ("meta.json", "train.npy", "validation.npy")}


@pytest.mark.parametrize("by_content", [True, False])
def test_cache_follows_the_files(
    folder: Path, make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, by_content: bool
) -> None:
    if not by_content:  # as for sources of more than 64 MiB
        monkeypatch.setattr(files, "_HASH_CONTENT_UP_TO", 0)
    file = folder / "05.txt"

    def write(text: str) -> None:
        file.write_text(text)
        os.utime(file, ns=(1, 1))

    fingerprints = [prepare_data(make(folder), tokenizer, seed=0).fingerprint]
    for change in (
        lambda: write(sentence(5).replace("Text", "Tixt")),
        lambda: write(sentence(5) + "!"),
        lambda: (folder / "new.txt").write_text("new"),
        lambda: file.rename(folder / "renamed.txt"),
    ):
        change()
        fingerprints.append(prepare_data(make(folder), tokenizer, seed=0).fingerprint)
    assert len(set(fingerprints)) == 5
    os.utime(folder / "06.txt", ns=(2, 2))
    assert (prepare_data(make(folder), tokenizer, seed=0).fingerprint == fingerprints[-1]) == by_content
    monkeypatch.chdir(folder.parent)
    assert (prepare_data(make("texts"), tokenizer, seed=0).fingerprint == fingerprints[-1]) == by_content


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


def replace_by_a_file(folder: Path) -> None:
    folder.rename(folder.with_name(".building-moved"))
    folder.write_text("a file")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"garbage" * 50),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "another document": lambda file: file.write_text("[]"),
}
DAMAGED = [(name, damage) for name in ("train.npy", "validation.npy", "meta.json") for damage in DAMAGES]


@pytest.mark.parametrize(("name", "damage"), [*DAMAGED, ("", "a file in its place")])
def test_damaged_cache_is_rebuilt(
    folder: Path, make: Any, tokenizer: Any, encodings: list[str], name: str, damage: str
) -> None:
    data = make(folder)
    first = prepare_data(data, tokenizer, seed=0)
    before = stored(data)
    DAMAGES.get(damage, replace_by_a_file)(Path(data.cache_dir) / first.fingerprint / name)
    for _ in range(2):
        again = prepare_data(data, tokenizer, seed=0)
        assert len(encodings) == 2
    assert np.isfinite(again.validation_unigram)
    assert {name: content for name, content in stored(data).items() if not name.startswith(".")} == before


def test_cache_that_cannot_be_written(folder: Path, make: Any, tokenizer: Any, caplog: Any) -> None:
    (folder.parent / "file").write_text("in the way")
    data = make(folder, cache_dir=str(folder.parent / "file" / "cache"))
    messages: list[tuple[str, float | None]] = []
    result = prepare_data(data, tokenizer, seed=0, on_progress=lambda *message: messages.append(message))
    assert not isinstance(result.train, np.memmap)
    assert_same(result, prepare_data(make(folder), tokenizer, seed=0))
    assert "data.cache_dir" in next(message for message, _ in messages if "not cached" in message)
    assert not caplog.records
    prepare_data(data, tokenizer, seed=0)
    assert "Tokenized text is not cached" in caplog.text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_build_that_ends_early_leaves_nothing(
    folder: Path, make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(token_cache, "seal", fail)
    messages: list[str] = []
    data = make(folder)
    with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else nullcontext():
        prepare_data(data, tokenizer, seed=0, on_progress=lambda message, _: messages.append(message))
        assert any("No space left on device" in message for message in messages)
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
    data = make(folder)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: prepare_data(data, tokenizer, seed=0), range(2))
    assert_same(first, second)
    assert [entry.name for entry in Path(data.cache_dir).iterdir()] == [first.fingerprint]


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cache_folder(**values: Any) -> Path:
        return token_cache.cache_folder(DataSettings(**values))

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "dtf" / "tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dtf" / "tokens"
    assert cache_folder(cache_dir="~/c") == tmp_path / "c"
