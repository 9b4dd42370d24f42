"""Streams: the same rows after a return, every document on one side, sources by weight, and a clean end."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dtfcli.data import hub as hub_source
from dtfcli.data import mixture as mixture_module
from dtfcli.data import packing
from dtfcli.data import stream as stream_module
from dtfcli.data.documents import Document, open_sources
from dtfcli.data.hub import SourceLost
from dtfcli.data.mixture import SourceStream, is_held_out
from dtfcli.data.prepare import prepare_data
from dtfcli.data.stream import Prefetcher, RowStream, document_mixture
from dtfcli.data.tokenizer import data_tokenizer
from dtfcli.errors import ConfigError, DataError
from dtfcli.settings.data import DataSettings
from tests.data.texts import sentence

SEED = 3


@pytest.fixture(autouse=True)
def _read_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not depend on it, and the standard library is long."""
    monkeypatch.setattr(stream_module, "_BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(packing, "_HEAD_TOKENS", 2**14)


def write_tables(folder: Path, kind: str = "jsonl", documents: int = 90, shards: int = 3, first: int = 0) -> Path:
    """A folder with sentences in .jsonl or .parquet shards, or a file for each."""
    folder.mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(first, first + documents), shards)):
        texts = [sentence(int(number)) for number in numbers]
        file = folder / f"train-{shard:05}-of-{shards:05}.{kind}"
        if kind == "jsonl":
            file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        elif kind == "parquet":
            table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
            pyarrow.parquet.write_table(table, file, row_group_size=7)
        else:
            file.write_text(texts[0])
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Let the Hub's owner/name be a folder on this machine, read by the real library."""
    import datasets

    builder = datasets.load_dataset_builder

    def serve(folder: Path) -> None:
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name: builder(str(folder), name))

    return serve


@pytest.fixture(params=["jsonl", "parquet", "txt", "hub", "python-stdlib"])
def path(request: pytest.FixtureRequest, tmp_path: Path, hub: Callable[[Path], None]) -> str:
    """A source of each kind."""
    kind = request.param
    if kind == "python-stdlib":
        return kind
    shards = {"shards": 40, "documents": 40} if kind == "txt" else {}
    folder = write_tables(tmp_path / "tables", "parquet" if kind == "hub" else kind, **shards)
    if kind == "hub":
        hub(folder)
        return "owner/name"
    return str(folder)


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Ninety sentences in three shards."""
    return write_tables(tmp_path / "tables")


def streaming(make: Any, *paths: str | Path, **values: Any) -> DataSettings:
    sources = [{"path": str(path), "streaming": True} for path in paths]
    return make(sources=sources, **{"shuffle_buffer": 8, "validation_blocks": 4, **values})


def take(count: int, data: DataSettings, tokenizer: Any, seed: int = SEED, **options: Any) -> np.ndarray:
    with closing(RowStream(data, tokenizer, seed=seed, **options)) as stream:
        return stream.take(count)


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was(make: Any, tokenizer: Any, path: str) -> None:
    """At any row, also passes later, through a state that JSON has carried."""
    data = streaming(make, path, seq_len=64)
    rows = take(160, data, tokenizer)
    assert len({row.tobytes() for row in rows}) > 40
    for at in (0, 1, 93, 159):
        with closing(RowStream(data, tokenizer, seed=SEED)) as first:
            for start in range(0, at, 50):
                assert np.array_equal(first.take(min(50, at - start)), rows[start : min(start + 50, at)])
            state = json.loads(json.dumps(first.state()))
        with closing(RowStream(data, tokenizer, seed=SEED, state=state)) as second:
            assert np.array_equal(second.take(160 - at), rows[at:])
            state = second.state()
        assert take(2, data, tokenizer, state=state).shape == (2, 64)  # from a state that was reached by returning


def test_the_seed_decides_the_order(make: Any, tokenizer: Any, tables: Path) -> None:
    data = streaming(make, tables, validation_fraction=0.0)
    first, again, other = (take(20, data, tokenizer, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def documents_of(data: DataSettings, *, held_out: bool) -> list[Document]:
    return list(document_mixture(open_sources(data.sources), data, SEED, held_out=held_out, passes=1))


def source_stream(data: DataSettings, window: int, **options: Any) -> SourceStream:
    return SourceStream(0, open_sources(data.sources)[0], seed=SEED, window=window, wanted=lambda _: True, **options)


def test_every_document_is_on_one_side(make: Any, tmp_path: Path) -> None:
    data = streaming(make, write_tables(tmp_path / "tables", "parquet"), validation_fraction=0.2)
    train, validation = (documents_of(data, held_out=side) for side in (False, True))
    texts = [document.text for document in train]
    assert sorted(texts + [document.text for document in validation]) == sorted(sentence(i) for i in range(90))
    assert 8 <= len(validation) <= 30
    assert texts != sorted(texts)
    assert all(is_held_out(document, 0.2, SEED) for document in validation)


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_each_pass_has_the_same_documents_in_another_order(make: Any, tables: Path, ratio: float) -> None:
    data = make(sources=[{"path": str(tables), "streaming": True, "ratio": ratio}], validation_fraction=0.0)
    ended: list[int] = []
    texts = [document.text for document in source_stream(data, 16, passes=3, on_pass=ended.append)]
    count = len(texts) // 3
    assert count == 90 if ratio == 1 else 20 <= count <= 52
    first, second, third = (texts[i * count : (i + 1) * count] for i in range(3))
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third
    assert ended == [1, 2, 3]


@pytest.mark.parametrize(
    ("key", "values", "shares"), [("weight", (6, 3, 1), (0.6, 0.3, 0.1)), ("ratio", (1, 0.5, 0.5), (0.5, 0.25, 0.25))]
)
def test_sources_are_drawn_by_weight_or_else_by_ratio(
    make: Any, tmp_path: Path, key: str, values: tuple[float, ...], shares: tuple[float, ...]
) -> None:
    paths = [write_tables(tmp_path / name, first=1000 * place) for place, name in enumerate("abc")]
    entries = zip(paths, values, strict=True)
    sources = [{"path": str(path), "streaming": True, key: value} for path, value in entries]
    data = make(sources=sources, shuffle_buffer=8, validation_fraction=0.0)
    mixture = document_mixture(open_sources(data.sources), data, SEED, held_out=False)
    counts = Counter(next(mixture).source for _ in range(3000))
    for place, share in enumerate(shares):
        assert counts[place] / 3000 == pytest.approx(share, abs=0.025)


@pytest.mark.slow
def test_prepared_head_is_the_beginning_of_the_stream(make: Any, tokenizer: Any, path: str, encodings: Any) -> None:
    data = streaming(make, path, seq_len=64, validation_fraction=0.2)
    result = prepare_data(data, tokenizer, seed=SEED)
    assert np.array_equal(take(20, data, tokenizer), result.train[:20])
    assert 1 <= len(result.validation) <= 4
    assert result.validation_unigram > 0
    size = sum(len(tokenizer.decode(row).encode()) for row in result.validation)
    assert result.validation_bytes_per_token == pytest.approx(size / result.validation.size, rel=0.15)
    calls = len(encodings)
    assert prepare_data(data, tokenizer, seed=SEED).fingerprint == result.fingerprint
    assert len(encodings) == calls  # from the cache
    for change in ({"shuffle_buffer": 9}, {"validation_blocks": 5}):
        other = streaming(make, path, seq_len=64, validation_fraction=0.2, **change)
        assert prepare_data(other, tokenizer, seed=SEED).fingerprint != result.fingerprint


def test_too_little_text_on_a_side(make: Any, tokenizer: Any, tables: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too little held-out text .* raise data\.validation_fraction"):
        prepare_data(streaming(make, tables, validation_fraction=1e-9), tokenizer, seed=SEED)
    (tmp_path / "one.txt").write_text(sentence(1))
    with pytest.raises(DataError, match="no document to use"):  # and no waiting for one that is not held out
        take(1, streaming(make, tmp_path / "one.txt", validation_fraction=0.999), tokenizer)


def test_a_note_when_a_source_begins_again(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    data = streaming(make, write_tables(tmp_path / "few", documents=30), validation_fraction=0.0)
    take(600, data, tokenizer, on_note=notes.append)
    assert [("data.sources[0]" in note, "begins again" in note) for note in notes] == [(True, True)]


def test_a_broken_row_ends_the_stream_with_its_place(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with closing(RowStream(streaming(make, tmp_path / "a.jsonl"), tokenizer, seed=SEED)) as stream:
        for _ in range(2):  # and once more for whoever takes again
            with pytest.raises(DataError, match=r"a\.jsonl, line 2: the text field 'text' is not a string"):
                stream.take(5)


def test_tokenizers_are_not_trained_on_streams(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer is empty: .* stream"):
        data_tokenizer(streaming(make, "python-stdlib"), vocab_size=300, seed=0)


class Broken(Iterator[Any]):
    """A shard of the Hub whose connection breaks at given reads, however often it is opened."""

    def __init__(self, breaks: list[int], error: Exception, rows: int = 40) -> None:
        self.breaks, self.error, self.rows = breaks, error, rows
        self.at, self.reads, self.opened = 0, 0, 0

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def __iter__(self) -> Broken:
        self.opened += 1
        return self

    def __next__(self) -> dict[str, str]:
        self.reads += 1
        if self.reads in self.breaks:
            self.at += 3  # what was read ahead and never given out
            raise self.error
        if self.at == self.rows:
            raise StopIteration
        self.at += 1
        return {"text": sentence(self.at - 1)}


def broken_shard(breaks: Iterable[int], error: Exception) -> tuple[Any, list[float]]:
    """A shard of the Hub that breaks, and the seconds that its reader waits before further tries."""
    waits: list[float] = []
    part = Broken(list(breaks), error)
    return hub_source._HubShard(part, "text", None, "data.sources[0].path = 'o/n'", sleep=waits.append), waits


def test_a_connection_that_breaks_loses_nothing() -> None:
    shard, waits = broken_shard([5, 6, 7, 20], ConnectionError("reset"))
    assert list(shard) == [sentence(i) for i in range(40)]
    assert waits == [1.0, 2.0, 4.0, 1.0]


def test_an_error_that_stays_ends_in_one_line() -> None:
    shard, waits = broken_shard(range(5, 100), TimeoutError("timed out"))
    assert [next(shard) for _ in range(4)] == [sentence(i) for i in range(4)]
    with pytest.raises(SourceLost, match=r"data\.sources\[0\]\.path = 'o/n': the Hub cannot .* 7 tries") as raised:
        next(shard)
    assert waits == list(hub_source.RETRY_WAITS)
    assert raised.value.exit_code == 1
    shard, waits = broken_shard([2], ValueError("bad page\nmore"))
    with pytest.raises(DataError, match=r"'o/n': a row cannot be read \(bad page\)"):
        list(shard)
    assert waits == []


def test_the_thread_ends(make: Any, tokenizer: Any, tables: Path) -> None:
    with closing(RowStream(streaming(make, tables), tokenizer, seed=SEED)) as stream:
        stream.take(3)
        assert any(thread.name == "dtf-stream" for thread in threading.enumerate())
    assert not any(thread.name == "dtf-stream" for thread in threading.enumerate())


def test_waiting_for_text_can_be_stopped() -> None:
    """Ctrl-C while the network is silent: `check` raises, and the items that come later are still there."""
    release = threading.Event()

    def slow() -> Iterator[Any]:
        release.wait(20)
        yield "late"

    class Stop(Exception):
        pass

    def check() -> None:
        raise Stop

    source = Prefetcher(slow())
    began = time.monotonic()
    with pytest.raises(Stop):
        source.take(check)
    assert time.monotonic() - began < 5
    release.set()
    assert source.take(lambda: None) == "late"
    source.close()


def test_the_thread_runs_ahead_by_a_bounded_number_of_batches() -> None:
    made: list[int] = []

    def endless() -> Iterator[Any]:
        while True:
            made.append(len(made))
            yield made[-1]

    source = Prefetcher(endless())
    time.sleep(0.5)
    assert 2 <= len(made) <= 8
    assert [source.take(lambda: None) for _ in range(50)] == list(range(50))
    source.close()


def test_a_mixture_leaves_out_a_source_that_has_ended(make: Any, tables: Path, tmp_path: Path) -> None:
    few = write_tables(tmp_path / "few", documents=3, shards=1, first=500)
    data = streaming(make, few, tables, validation_fraction=0.0)
    assert Counter(document.source for document in documents_of(data, held_out=False)) == {0: 3, 1: 90}


@pytest.mark.slow
def test_every_process_sees_the_same_rows(make: Any, tokenizer: Any, tables: Path, tmp_path: Path) -> None:
    """Processes that share a run each read the stream and divide up its rows, so they have to agree on them."""
    data = streaming(make, tables, write_tables(tmp_path / "more", "parquet"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = f"""
import hashlib, sys
from dtfcli.loading.load import load_tokenizer
from dtfcli.data.stream import RowStream
from dtfcli.settings.data import DataSettings
data = DataSettings.model_validate_json(sys.argv[1])
stream = RowStream(data, load_tokenizer(sys.argv[2]), seed={SEED})
print(hashlib.sha256(stream.take(100).tobytes()).hexdigest())
stream.close()
"""
    command = [sys.executable, "-c", code, data.model_dump_json(), str(tmp_path / "tokenizer")]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert child.stderr == ""
    assert child.stdout.strip() == hashlib.sha256(take(100, data, tokenizer).tobytes()).hexdigest()


def test_a_long_document_and_a_bounded_window(make: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A window ends at so much text; a document of many batches is cut into rows all the same."""
    monkeypatch.setattr(mixture_module, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(stream_module, "_BATCH_CHARACTERS", 500)
    texts = [sentence(i, 40 if i % 7 else 3000) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = streaming(make, tmp_path / "a.jsonl", validation_fraction=0.0, shuffle_buffer=1000)
    given = []
    for document in (window := source_stream(data, 1000, passes=1)):
        given.append(document.text)
        assert sum(len(held.text) for held in window._documents) < 2000 + max(map(len, texts))
    assert sorted(given) == sorted(texts)
    expected = take(900, data, tokenizer)
    with closing(RowStream(data, tokenizer, seed=SEED)) as first:
        first.take(333)
        state = json.loads(json.dumps(first.state()))
    assert np.array_equal(take(567, data, tokenizer, state=state), expected[333:])
