"""The studies' command: parent and study share no text, and each comparison plans what docs/results.md says."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtfcli.settings import load_settings
from dtfcli.studies.grid import parse_axes, parse_points, plan_grid, plan_points
from tools import studies


@pytest.fixture
def novels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two books a split, of numbered lines and paragraphs; twenty modules."""
    modules = [("", f"# module {number}\n") for number in range(20)]
    monkeypatch.setattr(studies.StdlibReader, "texts", lambda self, report: iter(modules))
    for split in ("train", "validation"):
        books = ["\n\n".join(f"{split} {book} {n}\n" + "word " * 60 for n in range(80)) for book in range(2)]
        pq.write_table(pa.table({"text": books}), tmp_path / f"{split}.parquet")
    return tmp_path


@pytest.fixture
def compared(novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of every `dtf compare` of both studies."""
    calls: list[list[str]] = []
    monkeypatch.setattr(studies, "_dtf", lambda *arguments: calls.append(list(arguments)))
    monkeypatch.setattr(studies, "train_parent", lambda *arguments: Path("parent"))
    for name in ("small", "adapted"):
        arguments = ["--novels", str(novels), "--output", str(tmp_path / name), "--model", "SmolLM2-135M.gguf"]
        monkeypatch.setattr("sys.argv", ["studies", name, *arguments])
        studies.main()
    return calls


def test_the_parent_has_seen_nothing_of_the_study(novels: Path) -> None:
    documents = studies.small_documents(novels)
    parent, study = (list(documents[name]) for name in ("parent", "study"))
    assert parent
    assert not set(parent) & set(study)
    assert sum(text.startswith("# module") for text in parent + study) == 20
    assert not any(text.startswith("train") for text in study)
    longest = max(len(text) for text in study)
    assert studies.PASSAGE <= longest < studies.PASSAGE + 400


def test_a_text_is_written_once(tmp_path: Path) -> None:
    file = studies.write_text(tmp_path / "texts" / "a.parquet", ["one", "two"])
    studies.write_text(file, ["other"])
    assert pq.read_table(file)["text"].to_pylist() == ["one", "two"]


def test_every_run_can_be_planned(compared: list[list[str]], tmp_path: Path) -> None:
    counts = []
    for command, preset, *arguments in compared:
        assert command == "compare"
        options = [(option, value) for option, value in pairwise(arguments) if option.startswith("--")]
        values = [value for _, value in options]
        settings = [item for item in arguments if "=" in item and item not in values]
        seeds = list(range(int(dict(options)["--seeds"])))
        axes, points = ([value for option, value in options if option == name] for name in ("--vary", "--point"))
        plan = (
            plan_points(preset, parse_points(points), seeds, settings, tmp_path)
            if points
            else plan_grid(preset, parse_axes(axes), seeds, settings, tmp_path)
        )
        counts.append(len(plan))
    assert counts == [45, 40, 36]


def test_the_parent_is_a_run_that_reads_its_settings(
    novels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []

    def train(*arguments: str) -> None:
        calls.append(arguments)
        (tmp_path / "parent" / "2026-01-31" / "parent").mkdir(parents=True)

    monkeypatch.setattr(studies, "_dtf", train)
    model = studies.train_parent(tmp_path, novels / "train.parquet", studies.PARENT)
    assert model == tmp_path / "parent" / "2026-01-31" / "parent" / "final_model"
    settings = load_settings(calls[0][1], [item for item in calls[0] if "=" in item])
    assert (settings.model.architecture, settings.training.max_steps) == ("dense", 3000)
