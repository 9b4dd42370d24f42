"""`eval.after`: the final model is scored at the end of a run, and a failing evaluation does not lose the run."""

import json
from pathlib import Path

import pytest

from dtfcli.errors import ConfigError
from dtfcli.experiment import train
from dtfcli.settings import load_settings
from dtfcli.training.events import TrainEvent
from tests.evaluation.conftest import write_dataset
from tests.training.small_runs import small_settings


@pytest.fixture
def science(tmp_path: Path) -> Path:
    """A data folder with an allenai/sciq of a few items."""
    write_dataset(tmp_path / "data" / "toy" / "quiz", {"train": 2})
    folder = tmp_path / "data" / "allenai" / "sciq"
    write_dataset(folder, {"validation": 1})
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    item = {"question": "What shines?", "support": "The sun shines.", **dict.fromkeys(names, "the moon")}
    (folder / "validation.jsonl").write_text("\n".join(json.dumps(item) for _ in range(3)))
    return tmp_path / "data"


@pytest.mark.slow
def test_scores_lie_in_the_run_folder(tmp_path: Path, science: Path) -> None:
    settings = small_settings(tmp_path, eval={"after": "sciq", "limit": 2, "data_dir": str(science)})
    result = train(settings)
    assert result.evaluation is not None
    assert result.evaluation.parent == result.run_dir / "eval"
    document = json.loads((result.run_dir / "eval" / "latest.json").read_text())
    assert document["results"]["sciq"]["n"] == 2
    assert document["results"]["sciq"]["split"] == "validation"
    assert document["architecture"] == "dtf"


def test_the_runs_own_text_scores_as_in_training(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, eval={"after": "validation_text"})
    result = train(settings)
    document = json.loads((result.run_dir / "eval" / "latest.json").read_text())
    metrics = document["results"]["validation_text"]["metrics"]
    assert metrics["loss"]["value"] == pytest.approx(result.metrics["val/loss"], abs=1e-5)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(result.metrics["val/bits_per_byte"], abs=1e-5)


@pytest.mark.slow
def test_a_failing_evaluation_does_not_lose_the_run(tmp_path: Path) -> None:
    events: list[TrainEvent] = []
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = small_settings(tmp_path, eval={"after": "sciq", "data_dir": str(empty)}, training={"max_steps": 1})
    result = train(settings, on_event=events.append)
    assert result.evaluation is None
    assert (result.final_model_path / "model.safetensors").exists()
    warning = next(event.message for event in events if event.kind == "warning")
    assert "allenai/sciq" in warning
    assert f"dtf eval {result.run_dir} --tasks sciq --data-dir {empty}" in warning


@pytest.mark.slow
def test_a_typing_mistake_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval.after = 'generl'.*Did you mean 'general'"):
        train(small_settings(tmp_path, eval={"after": "generl"}))
    with pytest.raises(ConfigError, match="confirm-run-unsafe-code"):
        train(small_settings(tmp_path, eval={"after": "code"}))
    assert not (tmp_path / "outputs").exists()


def test_settings_that_nothing_reads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval.limit = 5.*eval.after is empty"):
        load_settings("quickstart", ["eval.limit=5"])
    assert load_settings("quickstart", ["eval.after=general", "eval.limit=5"]).eval.limit == 5
