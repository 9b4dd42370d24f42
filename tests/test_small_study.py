"""The small study's command: its texts share nothing, and its grids train what docs/results.md says."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtfcli.studies.grid import parse_axes, plan_grid
from tools import small_study


@pytest.fixture
def novels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two books a split, of numbered lines and paragraphs; twenty modules."""

    def modules() -> Iterator[str]:
        yield from (f"# module {number}\n" for number in range(20))

    monkeypatch.setattr(small_study, "_modules", modules)
    for split in ("train", "validation"):
        books = ["\n\n".join(f"{split} {book} {n}\n" + "word " * 60 for n in range(80)) for book in range(2)]
        pq.write_table(pa.table({"text": books}), tmp_path / f"{split}.parquet")
    return tmp_path


def test_the_parent_has_seen_nothing_of_the_study(novels: Path, tmp_path: Path) -> None:
    files = small_study.write_texts(novels, tmp_path / "texts")
    parent, study = (pq.read_table(files[name])["text"].to_pylist() for name in ("parent", "study"))
    assert parent
    assert not set(parent) & set(study)
    assert sum(text.startswith("# module") for text in parent + study) == 20
    assert not any(text.startswith("train") for text in study)
    longest = max(len(text) for text in study)
    assert small_study.PASSAGE <= longest < small_study.PASSAGE + 400
    written = files["parent"].stat().st_mtime_ns
    small_study.write_texts(novels, tmp_path / "texts")
    assert files["parent"].stat().st_mtime_ns == written, "the same command goes on, it does not begin again"


def test_the_grids_are_those_of_the_results(novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(small_study, "_dtf", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(small_study, "train_parent", lambda *arguments: Path("parent"))
    monkeypatch.setattr("sys.argv", ["small_study", "--novels", str(novels), "--output", str(tmp_path / "out")])
    small_study.main()
    assert [call[:2] for call in calls] == [("compare", "quickstart")] * 2
    counts = []
    for call in calls:
        axes = [value for option, value in pairwise(call) if option == "--vary"]
        values = set(axes) | {value for option, value in pairwise(call) if option.startswith("--")}
        overrides = [item for item in call[2:] if "=" in item and item not in values]
        counts.append(len(plan_grid("quickstart", parse_axes(axes), [1, 2, 3, 4, 5], overrides, tmp_path)))
        assert call[call.index("--seeds") + 1] == "5"
    assert counts == [45, 40]
