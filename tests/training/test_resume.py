"""Interrupted and resumed runs end like undisturbed ones, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from dtfcli.errors import CheckpointError, ConfigError, DataError, DTFError
from dtfcli.experiment import train
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import checkpoint_folder, list_checkpoints, newest_run, run_settings
from dtfcli.training.checkpoint import find_checkpoint, read_state
from dtfcli.training.events import TrainEvent
from dtfcli.training.loop import TrainingInterrupted, TrainResult
from tests.training.small_runs import small_settings

# A prior with dropout, so that the random generators matter.
DROPOUT = {"prior_dropout": 0.3}


class Killed(BaseException):
    """What no handler in the loop catches."""


def kill_when(condition: Callable[[TrainEvent], bool]) -> Callable[[TrainEvent], None]:
    def listener(event: TrainEvent) -> None:
        if condition(event):
            raise Killed

    return listener


def the_run(folder: Path) -> Path:
    (run,) = (folder / "outputs").glob("*/small")
    return run


def weights(path: Path) -> dict[str, bytes]:
    with safe_open(path / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118  # not a dict


def metrics(run: Path) -> list[dict[str, Any]]:
    """All that does not measure time."""
    return [
        {name: value for name, value in line.items() if name not in ("tokens_per_second", "mfu")}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def assert_same(result: TrainResult, undisturbed: TrainResult) -> None:
    assert weights(result.final_model_path) == weights(undisturbed.final_model_path)
    assert result.best_model_path is not None
    assert undisturbed.best_model_path is not None
    assert weights(result.best_model_path) == weights(undisturbed.best_model_path)
    assert metrics(result.run_dir) == metrics(undisturbed.run_dir)
    assert result.metrics == undisturbed.metrics


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(small_settings(tmp_path_factory.mktemp("undisturbed"), model=DROPOUT))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its fifth step, with checkpoints of steps 2 and 4; tests change copies of it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Killed):
        train(small_settings(folder, model=DROPOUT), on_event=kill_when(lambda event: event.step == 5))
    return the_run(folder)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def resume(run: Path, on_event: Callable[[TrainEvent], None] | None = None) -> TrainResult:
    return train(run_settings(run), resume=run, on_event=on_event or (lambda event: None))


@pytest.mark.parametrize(("kind", "step"), [("step", 1), ("checkpoint", 2), ("evaluation", 3), ("phase", 6)])
def test_killed_and_resumed(tmp_path: Path, undisturbed: TrainResult, kind: str, step: int) -> None:
    settings = small_settings(tmp_path, model=DROPOUT)
    with pytest.raises(Killed):
        train(settings, on_event=kill_when(lambda event: (event.kind, event.step) == (kind, step)))
    assert not (the_run(tmp_path) / "final_model").exists()
    assert_same(resume(the_run(tmp_path)), undisturbed)


def test_killed_again_while_finishing(run: Path, undisturbed: TrainResult) -> None:
    """All steps are saved before what follows them, so that nothing is trained twice."""
    with pytest.raises(Killed):
        resume(run, kill_when(lambda event: event.message == "Writing a sample"))
    assert [read_state(path).step for path in list_checkpoints(run)] == [6, 4]
    steps: list[int] = []
    resumed = resume(run, lambda event: steps.append(event.step) if event.kind == "step" else None)
    assert steps == []
    assert_same(resumed, undisturbed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="attempts are forked")
@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_sigkill_at_random_moments(tmp_path: Path, kills: int) -> None:
    """While it reads, trains, evaluates, writes a checkpoint or its final model: nothing of it shows in the end."""
    command = [sys.executable, "-m", "tests.training.killed_runs", str(tmp_path / "runs"), str(kills), "20260131"]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert sum(map(len, report["kills"])) == kills
    whole = the_run(tmp_path / "runs" / "undisturbed")
    for number in range(len(report["kills"])):
        run = the_run(tmp_path / "runs" / f"killed-{number}")
        for model in ("final_model", "best_model"):
            assert weights(run / model) == weights(whole / model), report
        assert metrics(run) == metrics(whole), report
        assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
        assert [c.name for c in list_checkpoints(run)] == [c.name for c in list_checkpoints(whole)]


def test_killed_while_training_by_threshold(tmp_path: Path) -> None:
    """Thresholds then decide what is trained: they are part of the state."""
    results = []
    for name, kill in (("whole", None), ("killed", kill_when(lambda event: (event.kind, event.step) == ("step", 5)))):
        folder = tmp_path / name
        folder.mkdir()
        settings = small_settings(folder, training={"threshold_fraction": 0.5})
        if kill is None:
            results.append(train(settings))
        else:
            with pytest.raises(Killed):
                train(settings, on_event=kill)
            results.append(resume(the_run(folder)))
    assert_same(*results)


@pytest.mark.parametrize("damage", ["cut", "missing", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    run: Path, undisturbed: TrainResult, damage: str
) -> None:
    newest, before = list_checkpoints(run)
    assert (newest.name, before.name) == ("step-000004", "step-000002")
    if damage == "cut":
        os.truncate(newest / "model.safetensors", 100)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "tra')
    elif damage == "missing":
        (newest / "optimizer.bin").unlink()
    else:
        (newest / "state.json").write_text("{")
    events: list[TrainEvent] = []
    resumed = resume(run, events.append)
    warnings = [event.message for event in events if event.kind == "warning"]
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert any(event.message == f"Resuming from {before}" for event in events)
    assert_same(resumed, undisturbed)


def test_a_checkpoint_that_cannot_be_read_is_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, before = list_checkpoints(run)
    (newest.parent / "step-000004.bak").mkdir()  # not ours, and none
    opened = Path.open

    def bad_sector(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == newest / "optimizer.bin":
            raise OSError(5, "Input/output error")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", bad_sector)
    warnings: list[str] = []
    usable = find_checkpoint(run, warnings.append)
    assert usable is not None
    assert usable[0] == before
    assert len(warnings) == 1
    assert "cannot be read: Input/output error" in warnings[0]


def test_what_is_written_after_a_fall_back_is_kept(run: Path) -> None:
    """Damaged checkpoints of later steps do not count among those that are kept."""
    text = (run / "settings.toml").read_text()
    (run / "settings.toml").write_text(text.replace("keep_checkpoints = 2", "keep_checkpoints = 1"))
    for damaged in list_checkpoints(run):
        (damaged / "state.json").write_text("{")
    with pytest.raises(Killed):
        resume(run, kill_when(lambda event: (event.kind, event.step) == ("step", 3)))
    assert read_state(checkpoint_folder(run, 2)).step == 2


def test_changed_data_is_refused(run: Path, tmp_path: Path) -> None:
    (source,) = run_settings(run).data.sources
    text = Path(source.path).read_text() + '\n{"text": "one more document"}'
    (tmp_path / "text.jsonl").write_text(text)
    settings = (run / "settings.toml").read_text()
    (run / "settings.toml").write_text(settings.replace(source.path, str(tmp_path / "text.jsonl")))
    with pytest.raises(DataError, match="have changed since this run began"):
        resume(run)


def test_no_run_to_resume(tmp_path: Path) -> None:
    (tmp_path / "outputs" / "2026-01-01" / "mine").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no settings\.toml"):
        run_settings(tmp_path / "outputs" / "2026-01-01" / "mine")
    with pytest.raises(CheckpointError, match="Did you mean 'mine'"):
        run_settings(tmp_path / "outputs" / "2026-01-01" / "mime")
    with pytest.raises(CheckpointError, match="there are none"):
        newest_run(tmp_path / "outputs")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = small_settings(tmp_path, run={"output_dir": str(tmp_path / "file" / "outputs")})
    with pytest.raises(DTFError, match="cannot be written"):
        train(settings)


SCRIPT = """
import sys, time, torch
from pathlib import Path
from dtfcli.errors import DTFError
from dtfcli.experiment import train
from tests.training.small_runs import small_settings
torch.set_num_threads(1)

def listener(event):
    if event.kind == "step":
        print(event.step, flush=True)
        if event.step >= 3:
            time.sleep(float(sys.argv[2]))

settings = small_settings(Path(sys.argv[1]), training={"max_steps": 400, "eval_every": 400, "checkpoint_every": 400})
try:
    train(settings, on_event=listener)
except DTFError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(folder: Path, pause: float) -> "subprocess.Popen[str]":
    """A run in a process of its own, past its third step."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "3":
        assert process.poll() is None
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_130(tmp_path: Path, number: signal.Signals) -> None:
    small_settings(tmp_path)
    process = start(tmp_path, 0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == TrainingInterrupted.exit_code == 130
    (saved,) = list_checkpoints(the_run(tmp_path))
    step = read_state(saved).step
    assert step >= 3
    assert errors.strip().splitlines()[-1] == (
        f"Interrupted at step {step} of 400, saved as {saved}. Go on with: dtf train --resume {the_run(tmp_path)}"
    )
    assert (the_run(tmp_path) / "curves.png").exists()


@pytest.mark.slow
def test_a_run_in_progress_is_not_resumed_and_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    small_settings(tmp_path)
    process = start(tmp_path, 20.0)
    run = the_run(tmp_path)
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match="another process is training"):
        resume(run)  # two would write the same files
    assert sorted(run.rglob("*")) == before
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert list_checkpoints(run) == []
    train(run_settings(run).model_copy(update={"training": small_settings(tmp_path).training}), resume=run)
