"""`eval.after`: the final model is scored at the end of a run, and a failing evaluation does not lose the run."""

import json
from pathlib import Path

import pytest

from dtfcli.experiment import train
from dtfcli.settings import load_settings
from dtfcli.training.events import TrainEvent
from tests.training.small_runs import small_settings


@pytest.fixture
def science(tmp_path: Path) -> Path:
    """A data folder with an allenai/ai2_arc of a few items."""
    folder = tmp_path / "data" / "allenai" / "ai2_arc"
    folder.mkdir(parents=True)
    item = {"question": "What shines?", "choices": {"text": ["moon", "sun"], "label": ["A", "B"]}, "answerKey": "A"}
    (folder / "items.jsonl").write_text("\n".join(json.dumps(item) for _ in range(3)))
    files = [{"split": split, "path": "items.jsonl"} for split in ("train", "validation", "test")]
    card = {"configs": [{"config_name": "ARC-Easy", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return tmp_path / "data"


def test_scores_lie_in_the_run_folder(tmp_path: Path, science: Path) -> None:
    settings = small_settings(tmp_path, eval={"after": "arc_easy", "limit": 2, "data_dir": str(science)})
    result = train(settings)
    assert result.evaluation is not None
    assert result.evaluation.parent == result.run_dir / "eval"
    document = json.loads((result.run_dir / "eval" / "latest.json").read_text())
    assert (document["results"]["arc_easy"]["n"], document["results"]["arc_easy"]["split"]) == (2, "test")
    assert document["architecture"] == "dtf"


def test_the_runs_own_text_scores_as_in_training(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, eval={"after": "validation_text"})
    result = train(settings)
    document = json.loads((result.run_dir / "eval" / "latest.json").read_text())
    metrics = document["results"]["validation_text"]["metrics"]
    assert metrics["loss"]["value"] == pytest.approx(result.metrics["val/loss"], abs=1e-5)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(result.metrics["val/bits_per_byte"], abs=1e-5)


def test_a_failing_evaluation_does_not_lose_the_run(tmp_path: Path) -> None:
    events: list[TrainEvent] = []
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = small_settings(tmp_path, eval={"after": "arc_easy", "data_dir": str(empty)}, training={"max_steps": 1})
    result = train(settings, on_event=events.append)
    assert result.evaluation is None
    assert (result.final_model_path / "model.safetensors").exists()
    warning = next(event.message for event in events if event.kind == "warning")
    assert "allenai/ai2_arc" in warning
    assert f"dtf eval {result.run_dir} --tasks arc_easy --data-dir {empty}" in warning


def test_settings_that_something_reads_are_taken() -> None:
    assert load_settings("quickstart", ["eval.after=general", "eval.limit=5"]).eval.limit == 5
