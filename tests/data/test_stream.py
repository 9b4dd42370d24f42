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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtfcli.data import hub as hub_source
from dtfcli.data import mixture as mixture_module
from dtfcli.data import packing
from dtfcli.data import stream as stream_module
from dtfcli.data.documents import Document, open_sources
from dtfcli.data.hub import SourceLost
from dtfcli.data.mixture import Mixture, SourceStream, is_held_out
from dtfcli.data.prepare import prepare_data
from dtfcli.data.stream import Prefetcher, RowStream, document_mixture
from dtfcli.errors import ConfigError, DataError
from dtfcli.settings.data import DataSettings
from tests.data.texts import sentence

SEED = 3


@pytest.fixture(autouse=True)
def _read_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not depend on it, and the standard library is long."""
    monkeypatch.setattr(stream_module, "_BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(packing, "_HEAD_TOKENS", 2**14)


def write_tables(folder: Path, kind: str, documents: int = 90, shards: int = 3, first: int = 0) -> Path:
    """A folder with sentences in .jsonl or .parquet shards."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    numbers = np.arange(first, first + documents)
    for shard, part in enumerate(np.array_split(numbers, shards)):
        texts = [sentence(int(number)) for number in part]
        name = f"train-{shard:05}-of-{shards:05}"
        if kind == "jsonl":
            (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        else:
            table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
            pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=7)
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
    if request.param == "python-stdlib":
        return "python-stdlib"
    if request.param == "txt":
        (tmp_path / "texts").mkdir()
        for i in range(40):
            (tmp_path / "texts" / f"{i:02}.txt").write_text(sentence(i))
        return str(tmp_path / "texts")
    folder = write_tables(tmp_path / "tables", "parquet" if request.param == "hub" else request.param)
    if request.param == "hub":
        hub(folder)
        return "owner/name"
    return str(folder)


def streaming(make: Any, *paths: str | Path, **values: Any) -> DataSettings:
    sources = [{"path": str(path), "streaming": True} for path in paths]
    return make(sources=sources, **{"shuffle_buffer": 8, "validation_blocks": 4, **values})


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was(make: Any, tokenizer: Any, path: str) -> None:
    """At any row, also passes later, through a state that JSON has carried."""
    data = streaming(make, path, seq_len=64)
    whole = RowStream(data, tokenizer, seed=SEED)
    rows = whole.take(160)
    whole.close()
    assert len({row.tobytes() for row in rows}) > 40
    for at in (0, 1, 93, 159):
        first = RowStream(data, tokenizer, seed=SEED)
        for start in range(0, at, 50):
            assert np.array_equal(first.take(min(50, at - start)), rows[start : min(start + 50, at)])
        state = json.loads(json.dumps(first.state()))
        first.close()
        second = RowStream(data, tokenizer, seed=SEED, state=state)
        assert np.array_equal(second.take(160 - at), rows[at:])
        # And from a state that was reached by returning.
        third = RowStream(data, tokenizer, seed=SEED, state=second.state())
        second.close()
        assert third.take(2).shape == (2, 64)
        third.close()


def test_the_seed_decides_the_order(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = streaming(make, write_tables(tmp_path / "tables", "jsonl"), validation_fraction=0.0)
    taken = []
    for seed in (1, 1, 2):
        stream = RowStream(data, tokenizer, seed=seed)
        taken.append(stream.take(20))
        stream.close()
    assert np.array_equal(taken[0], taken[1])
    assert not np.array_equal(taken[0], taken[2])


def documents_of(data: DataSettings, *, held_out: bool, seed: int = SEED) -> list[Document]:
    return list(document_mixture(open_sources(data.sources), data, seed, held_out=held_out, passes=1))


def test_every_document_is_on_one_side(make: Any, tmp_path: Path) -> None:
    data = streaming(make, write_tables(tmp_path / "tables", "parquet"), validation_fraction=0.2)
    train, validation = (documents_of(data, held_out=side) for side in (False, True))
    texts = [document.text for document in train + validation]
    assert sorted(texts) == sorted(sentence(i) for i in range(90))
    assert 8 <= len(validation) <= 30
    assert [document.text for document in train] != sorted(document.text for document in train)
    assert all(is_held_out(document, 0.2, SEED) for document in validation)


def test_each_pass_has_every_document_in_another_order(make: Any, tmp_path: Path) -> None:
    data = streaming(make, write_tables(tmp_path / "tables", "jsonl"), validation_fraction=0.0)
    readers = open_sources(data.sources)
    ended: list[int] = []
    stream = SourceStream(0, readers[0], seed=SEED, window=16, wanted=lambda _: True, passes=3, on_pass=ended.append)
    texts = [document.text for document in stream]
    passes = [texts[i : i + 90] for i in (0, 90, 180)]
    assert [sorted(one) == sorted(passes[0]) for one in passes] == [True] * 3
    assert passes[0] != passes[1] != passes[2]
    assert ended == [1, 2, 3]


def test_sources_are_drawn_by_weight(make: Any, tmp_path: Path) -> None:
    paths = [write_tables(tmp_path / name, "jsonl", first=1000 * place) for place, name in enumerate("abc")]
    sources = [
        {"path": str(path), "streaming": True, "weight": weight} for path, weight in zip(paths, (6, 3, 1), strict=True)
    ]
    data = make(sources=sources, shuffle_buffer=8, validation_fraction=0.0)
    mixture = document_mixture(open_sources(data.sources), data, SEED, held_out=False)
    counts = Counter(next(mixture).source for _ in range(4000))
    for source, share in enumerate((0.6, 0.3, 0.1)):
        assert counts[source] / 4000 == pytest.approx(share, abs=0.025)
    # Without weights the ratios take their place.
    ratios = [
        {"path": str(path), "streaming": True, "ratio": r} for path, r in zip(paths, (1.0, 0.5, 0.5), strict=True)
    ]
    data = make(sources=ratios, shuffle_buffer=8, validation_fraction=0.0)
    mixture = document_mixture(open_sources(data.sources), data, SEED, held_out=False)
    counts = Counter(next(mixture).source for _ in range(4000))
    assert counts[0] / 4000 == pytest.approx(0.5, abs=0.025)


def test_a_ratio_keeps_the_same_documents_on_every_pass(make: Any, tmp_path: Path) -> None:
    folder = write_tables(tmp_path / "tables", "jsonl")
    data = make(sources=[{"path": str(folder), "streaming": True, "ratio": 0.4}], validation_fraction=0.0)
    stream = SourceStream(0, open_sources(data.sources)[0], seed=SEED, window=8, wanted=lambda _: True, passes=2)
    texts = [document.text for document in stream]
    half = len(texts) // 2
    assert 20 <= half <= 52
    assert sorted(texts[:half]) == sorted(texts[half:])


@pytest.mark.slow
def test_prepared_head_is_the_beginning_of_the_stream(make: Any, tokenizer: Any, path: str, encodings: Any) -> None:
    data = streaming(make, path, seq_len=64, validation_fraction=0.2)
    result = prepare_data(data, tokenizer, seed=SEED)
    stream = RowStream(data, tokenizer, seed=SEED)
    assert np.array_equal(stream.take(20), result.train[:20])
    stream.close()
    assert 1 <= len(result.validation) <= 4
    assert result.validation_unigram > 0
    assert result.validation_bytes_per_token == pytest.approx(
        sum(len(tokenizer.decode(row).encode()) for row in result.validation) / result.validation.size, rel=0.15
    )
    calls = len(encodings)
    assert prepare_data(data, tokenizer, seed=SEED).fingerprint == result.fingerprint
    assert len(encodings) == calls  # from the cache
    for change in ({"shuffle_buffer": 9}, {"validation_blocks": 5}):
        other = streaming(make, path, seq_len=64, validation_fraction=0.2, **change)
        assert prepare_data(other, tokenizer, seed=SEED).fingerprint != result.fingerprint


def test_too_little_held_out_text(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = streaming(make, write_tables(tmp_path / "tables", "jsonl"), validation_fraction=1e-9)
    with pytest.raises(DataError, match=r"too little held-out text .* raise data\.validation_fraction"):
        prepare_data(data, tokenizer, seed=SEED)


def test_a_source_of_held_out_documents_alone_does_not_hang(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(sentence(1))
    data = streaming(make, tmp_path / "one.txt", validation_fraction=0.999)
    stream = RowStream(data, tokenizer, seed=SEED)
    with pytest.raises(DataError, match="no document to use"):
        stream.take(1)
    stream.close()


def test_a_note_when_a_source_begins_again(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    data = streaming(make, write_tables(tmp_path / "tables", "jsonl", documents=30), validation_fraction=0.0)
    stream = RowStream(data, tokenizer, seed=SEED, on_note=notes.append)
    stream.take(600)
    stream.close()
    assert len(notes) == 1
    assert "data.sources[0]" in notes[0]
    assert "begins again" in notes[0]


def test_a_broken_row_ends_the_stream_with_its_place(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    stream = RowStream(streaming(make, tmp_path / "a.jsonl"), tokenizer, seed=SEED)
    for _ in range(2):  # whoever asks again is told again
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: the text field 'text' is not a string"):
            stream.take(5)
    stream.close()


def test_tokenizers_are_not_trained_on_streams(make: Any) -> None:
    from dtfcli.data.tokenizer import data_tokenizer

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


def test_a_connection_that_breaks_loses_nothing() -> None:
    waits: list[float] = []
    part = Broken([5, 6, 7, 20], ConnectionError("reset"))
    shard = hub_source._HubShard(part, "text", None, "x", sleep=waits.append)
    assert list(shard) == [sentence(i) for i in range(40)]
    assert waits == [1.0, 2.0, 4.0, 1.0]
    assert part.opened == 5


def test_a_connection_that_stays_broken_ends_in_one_line() -> None:
    waits: list[float] = []
    part = Broken(list(range(5, 100)), TimeoutError("timed out"))
    shard = hub_source._HubShard(part, "text", None, "data.sources[0].path = 'o/n'", sleep=waits.append)
    assert [next(shard) for _ in range(4)] == [sentence(i) for i in range(4)]
    with pytest.raises(SourceLost, match=r"data\.sources\[0\]\.path = 'o/n': the Hub cannot .* 7 tries") as raised:
        next(shard)
    assert waits == list(hub_source.RETRY_WAITS)
    assert raised.value.exit_code == 1


def test_an_error_that_stays_is_not_tried_again() -> None:
    waits: list[float] = []
    shard = hub_source._HubShard(Broken([2], ValueError("bad page\nmore")), "text", None, "x", sleep=waits.append)
    with pytest.raises(DataError, match=r"x: a row cannot be read \(bad page\)"):
        list(shard)
    assert waits == []


def test_the_thread_ends(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = streaming(make, write_tables(tmp_path / "tables", "parquet"))
    stream = RowStream(data, tokenizer, seed=SEED)
    stream.take(3)
    assert any(thread.name == "dtf-stream" for thread in threading.enumerate())
    stream.close()
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


def test_a_mixture_leaves_out_what_has_ended(make: Any, tmp_path: Path) -> None:
    paths = [
        write_tables(tmp_path / "few", "jsonl", documents=3, shards=1),
        write_tables(tmp_path / "many", "jsonl", first=500),
    ]
    data = streaming(make, *paths, validation_fraction=0.0)
    counts = Counter(document.source for document in documents_of(data, held_out=False))
    assert counts == {0: 3, 1: 90}
    assert list(Mixture([], [], 0)) == []


@pytest.mark.slow
def test_every_process_sees_the_same_rows(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Processes that share a run each read the stream and divide up its rows, so they have to agree on them."""
    data = streaming(make, write_tables(tmp_path / "tables", "parquet"), write_tables(tmp_path / "more", "jsonl"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data.json").write_text(data.model_dump_json())
    code = (
        "import hashlib, json, sys\nfrom pathlib import Path\nfrom dtfcli.loading.load import load_tokenizer\n"
        "from dtfcli.settings.data import DataSettings\nfrom dtfcli.data.stream import RowStream\n"
        "folder = Path(sys.argv[1])\n"
        "data = DataSettings.model_validate_json((folder / 'data.json').read_text())\n"
        f"stream = RowStream(data, load_tokenizer(folder / 'tokenizer'), seed={SEED})\n"
        "print(hashlib.sha256(stream.take(100).tobytes()).hexdigest())\nstream.close()"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stderr == ""
    stream = RowStream(data, tokenizer, seed=SEED)
    assert child.stdout.strip() == hashlib.sha256(stream.take(100).tobytes()).hexdigest()
    stream.close()


def test_a_long_document_and_a_bounded_window(make: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A window ends at so much text; a document of many batches is cut into rows all the same."""
    monkeypatch.setattr(mixture_module, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(stream_module, "_BATCH_CHARACTERS", 500)
    texts = [sentence(i, 40 if i % 7 else 3000) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = streaming(make, tmp_path / "a.jsonl", validation_fraction=0.0, shuffle_buffer=1000)
    source = SourceStream(0, open_sources(data.sources)[0], seed=SEED, window=1000, wanted=lambda _: True, passes=1)
    longest = 0
    given = []
    for document in source:
        given.append(document.text)
        longest = max(longest, sum(len(held.text) for held in source._documents))
    assert sorted(given) == sorted(texts)
    assert longest < 2000 + max(map(len, texts))
    rows = RowStream(data, tokenizer, seed=SEED)
    expected = rows.take(900)
    rows.close()
    first = RowStream(data, tokenizer, seed=SEED)
    first.take(333)
    second = RowStream(data, tokenizer, seed=SEED, state=json.loads(json.dumps(first.state())))
    assert np.array_equal(second.take(567), expected[333:])
    first.close()
    second.close()
