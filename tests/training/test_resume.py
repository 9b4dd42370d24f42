"""Interrupted and resumed runs end like undisturbed ones, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dtfcli.errors import CheckpointError, ConfigError, DataError, DTFError
from dtfcli.experiment import train
from dtfcli.runs.folder import checkpoint_folder, list_checkpoints, newest_run, run_settings
from dtfcli.training.checkpoint import find_checkpoint, read_state
from dtfcli.training.events import TrainEvent
from dtfcli.training.loop import TrainingInterrupted, TrainResult
from tests.training.small_runs import Killed, assert_same, kill_at, resume, small_settings, the_run

ROOT = Path(__file__).parents[2]
# A prior with dropout, so that the random generators matter, and thresholds that decide what is trained.
GROUPS: dict[str, Any] = {"model": {"prior_dropout": 0.3}, "training": {"threshold_fraction": 0.5}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(small_settings(tmp_path_factory.mktemp("undisturbed"), **GROUPS))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its fifth step, with checkpoints of steps 2 and 4; tests change copies of it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Killed):
        train(small_settings(folder, **GROUPS), on_event=kill_at("step", 5))
    return the_run(folder)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_killed_before_the_first_checkpoint(tmp_path: Path, undisturbed: TrainResult) -> None:
    with pytest.raises(Killed):
        train(small_settings(tmp_path, **GROUPS), on_event=kill_at("step", 1))
    assert not (the_run(tmp_path) / "final_model").exists()
    assert_same(resume(the_run(tmp_path)), undisturbed)


def test_killed_again_while_finishing(run: Path, undisturbed: TrainResult) -> None:
    """All steps are saved before the run is finished, so that nothing is trained twice."""
    with pytest.raises(Killed):
        resume(run, kill_at("phase", 6))
    assert [read_state(path).step for path in list_checkpoints(run)] == [6, 4]
    steps: list[int] = []
    resumed = resume(run, lambda event: steps.append(event.step) if event.kind == "step" else None)
    assert steps == []
    assert_same(resumed, undisturbed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="attempts are forked")
@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_sigkill_at_random_moments(tmp_path: Path, kills: int) -> None:
    """While it reads, trains, evaluates, writes a checkpoint or its final model: the end is the same."""
    command = [sys.executable, "-m", "tests.training.killed_runs", str(tmp_path), str(kills), "20260131"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    moments = json.loads(result.stdout)
    assert sum(map(len, moments)) == kills
    whole = the_run(tmp_path / "undisturbed")
    for number in range(len(moments)):
        killed = the_run(tmp_path / f"killed-{number}")
        for file in ("final_model/model.safetensors", "best_model/model.safetensors"):
            assert (killed / file).read_bytes() == (whole / file).read_bytes(), moments
        assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
        assert [c.name for c in list_checkpoints(killed)] == [c.name for c in list_checkpoints(whole)]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run: Path, undisturbed: TrainResult) -> None:
    newest, before = list_checkpoints(run)
    assert (newest.name, before.name) == ("step-000004", "step-000002")
    os.truncate(newest / "model.safetensors", 100)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tra')
    events: list[TrainEvent] = []
    resumed = resume(run, events.append)
    (warning,) = [event.message for event in events if event.kind == "warning"]
    assert str(newest) in warning
    assert any(event.message == f"Resuming from {before}" for event in events)
    assert_same(resumed, undisturbed)


@pytest.mark.parametrize("damage", ["is missing", "cannot be read", "Input/output error"])
def test_other_damage(run: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    newest, before = list_checkpoints(run)
    (newest.parent / "step-000004.bak").mkdir()  # not ours, and none
    opened = Path.open

    def bad_sector(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == newest / "optimizer.bin":
            raise OSError(5, "Input/output error")
        return opened(path, *arguments, **options)

    if damage == "is missing":
        (newest / "optimizer.bin").unlink()
    elif damage == "cannot be read":
        (newest / "state.json").write_text("{")
    else:
        monkeypatch.setattr(Path, "open", bad_sector)
    warnings: list[str] = []
    usable = find_checkpoint(run, warnings.append)
    assert usable is not None
    assert usable[0] == before
    assert [str(newest) in warning and damage in warning for warning in warnings] == [True]


def test_later_damaged_checkpoints_do_not_count_among_the_kept(run: Path) -> None:
    text = (run / "settings.toml").read_text()
    (run / "settings.toml").write_text(text.replace("keep_checkpoints = 2", "keep_checkpoints = 1"))
    for damaged in list_checkpoints(run):
        (damaged / "state.json").write_text("{")
    with pytest.raises(Killed):
        resume(run, kill_at("step", 3))
    assert read_state(checkpoint_folder(run, 2)).step == 2


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state = Accelerator.save_state

    def fill_up(self: Any, folder: str, **options: Any) -> Any:
        if "step-000004" in folder:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_state(self, folder, **options)

    monkeypatch.setattr(Accelerator, "save_state", fill_up)
    with pytest.raises(DTFError, match="the disk is full"):
        train(small_settings(tmp_path))
    (checkpoint,) = (the_run(tmp_path) / "checkpoints").iterdir()
    assert (checkpoint.name, read_state(checkpoint).step) == ("step-000002", 2)
    # Weights as safetensors; everything else loads with weights_only.
    assert {path.name for path in checkpoint.iterdir()} == {
        "model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json",
    }  # fmt: skip
    torch.load(checkpoint / "optimizer.bin", weights_only=True)


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
    small_settings(folder)  # writes the text
    command = [sys.executable, "-c", SCRIPT, str(folder), str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "3":
        assert process.poll() is None
    return process


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(tmp_path: Path) -> None:
    process = start(tmp_path, 0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == TrainingInterrupted.exit_code == 130
    run = the_run(tmp_path)
    (saved,) = list_checkpoints(run)
    step = read_state(saved).step
    assert step >= 3
    assert errors.strip().splitlines()[-1] == (
        f"Interrupted at step {step} of 400, saved as {saved}. Go on with: dtf train --resume {run}"
    )
    assert (run / "curves.png").exists()


@pytest.mark.slow
def test_a_run_in_progress_is_not_resumed_and_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
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
