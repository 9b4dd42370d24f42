"""Interrupted and resumed runs end like undisturbed ones, bit for bit. docs/load.md lists the faults."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.errors import CheckpointError, DataError
from dtfcli.experiment import train
from dtfcli.runs import folder as folders
from dtfcli.runs.folder import checkpoint_folder, list_checkpoints, newest_run, run_settings
from dtfcli.training.checkpoint import find_checkpoint, read_state
from dtfcli.training.events import TrainEvent
from dtfcli.training.loop import TrainResult
from tests import faults
from tests.faults import Dtf, at_step
from tests.training.small_runs import Killed, assert_same, kill_at, resume, small_settings, the_run

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


def test_killed_again_while_finishing(run: Path, undisturbed: TrainResult) -> None:
    """All steps are saved before the run is finished, so that nothing is trained twice."""
    with pytest.raises(Killed):
        resume(run, kill_at("phase", 6))
    assert [read_state(path).step for path in list_checkpoints(run)] == [6, 4]
    steps: list[int] = []
    resume(run, lambda event: steps.append(event.step) if event.kind == "step" else None)
    assert steps == []
    assert_same(run, undisturbed.run_dir)


def lose_the_checkpoints(run: Path) -> str:
    shutil.rmtree(run / "checkpoints")
    return "has no usable checkpoint: starting from the beginning"


def damage_the_newest_checkpoint(run: Path) -> str:
    newest, _ = list_checkpoints(run)
    os.truncate(newest / "model.safetensors", 100)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tra')
    return f"{newest} is damaged (model.safetensors does not match its hash)"


def set_the_clock_back(run: Path) -> str:
    """Every file of the run is from the future, and the checkpoint before the last is its latest."""
    future = datetime(2099, 1, 1).timestamp()
    for path in run.rglob("*"):
        os.utime(path, (future, future + (86400 if "step-000002" in str(path) else 0)))
    return ""


@pytest.mark.parametrize("change", [lose_the_checkpoints, damage_the_newest_checkpoint, set_the_clock_back])
def test_what_a_run_finds_when_it_goes_on(run: Path, undisturbed: TrainResult, change: Callable[[Path], str]) -> None:
    warning, events = change(run), list[TrainEvent]()
    newest, before = f"Resuming from {checkpoint_folder(run, 4)}", f"Resuming from {checkpoint_folder(run, 2)}"
    resume(run, events.append)
    assert [warning in event.message for event in events if event.kind == "warning"] == [True] * bool(warning)
    resumed = [event.message for event in events if event.message.startswith("Resuming from")]
    assert resumed == {"": [newest]}.get(warning, [before] if "damaged" in warning else [])
    assert_same(run, undisturbed.run_dir)


FAULTS = [
    (faults.fill_the_disk, 1, "cannot be written, File too large, or choose another run.output_dir"),
    (faults.use_up_the_memory, 1, "Out of memory. Start a new run with any of training.micro_batch_size=1 (it was 2)"),
    (faults.interrupt, 130, "Interrupted at step 5 of 6, saved as"),
    (faults.remove_the_folder, 1, "cannot be written, it was removed, or its disk is gone; put it back"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code", "words"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_is_explained_and_loses_nothing(
    run: Path, tmp_path: Path, undisturbed: TrainResult, fault: Any, code: int, words: str
) -> None:
    """In the fifth step, of a process of its own: one line says what to do, and `dtf train --resume` does the rest."""
    outcome = Dtf(tmp_path, "train", "--resume", run, fault=partial(at_step, 4, fault)).ends()
    assert outcome.code == code, outcome
    assert words in outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr
    if fault is faults.remove_the_folder:
        assert not run.exists()
        return
    kept = list_checkpoints(run)
    assert [read_state(path).step for path in kept] == ([5, 4] if code == 130 else [4, 2])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(path.name for path in kept)
    assert (run / "curves.png").exists() == (code == 130)
    outcome = Dtf(tmp_path, "train", "--resume", run).ends()
    assert outcome.code == 0, outcome
    assert_same(run, undisturbed.run_dir)


@pytest.mark.slow
def test_one_process_at_a_time_resumes_a_run(run: Path, tmp_path: Path) -> None:
    """The lock of a killed process is gone with it. A second Ctrl-C stops a run at once, and saves nothing."""
    hangs = partial(at_step, 5, faults.hang)
    first = Dtf(tmp_path / "first", "train", "--resume", run, fault=hangs)
    first.says("It hangs.")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    second = Dtf(tmp_path / "second", "train", "--resume", run).ends()
    assert second.code == 2
    assert "another process is training or saving this run; stop it first" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert first.ends(kill_after=0.0).code == -signal.SIGKILL

    third = Dtf(tmp_path / "third", "train", "--resume", run, fault=hangs)
    third.says("It hangs.")
    assert third.process.pid is not None
    os.kill(third.process.pid, signal.SIGINT)
    third.says("Ctrl-C again stops at once")
    assert third.ends(kill_after=0.0, number=signal.SIGINT).code == 130
    assert [read_state(path).step for path in list_checkpoints(run)] == [4, 2]


def test_a_file_system_without_locks_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folders.fcntl, "flock", no_locks)
    messages: list[str] = []

    def listener(event: TrainEvent) -> None:
        messages.append(event.message)
        kill_at("phase", 4)(event)

    with pytest.raises(Killed):
        resume(run, listener)
    assert f"{run}: its file system has no locks; let no other process resume it." in messages


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_sigkill_at_random_moments(tmp_path: Path, kills: int) -> None:
    """While it reads, trains, evaluates, writes a checkpoint or its final model: the end is the same.

    When a run ends before all kills are spent, another one takes the rest, and so on.
    """
    training = {"max_steps": 24, "eval_every": 8, "checkpoint_every": 4, "log_every": 1}
    rng, moments = random.Random(20260131), list[list[float]]()

    def attempt(folder: Path, kill_after: float = 120.0) -> bool:
        """Begin the run in a folder, or go on with it; whether it came to its end."""
        settings = small_settings(folder, model={"prior_dropout": 0.3}, training=training)
        (folder / "small.toml").write_text(settings.to_toml())
        begun = [path.parent for path in folder.glob("outputs/*/small/settings.toml")]
        arguments = ["--resume", *begun] if begun else ["--config", folder / "small.toml"]
        outcome = Dtf(folder, "train", *arguments).ends(kill_after)
        assert outcome.code in (0, -signal.SIGKILL), outcome
        return outcome.code == 0

    began = time.monotonic()
    assert attempt(tmp_path / "undisturbed")
    seconds, whole = time.monotonic() - began, the_run(tmp_path / "undisturbed")
    while (left := kills - sum(map(len, moments))) > 0:
        folder = tmp_path / f"killed-{len(moments)}"
        moments.append([])
        while len(moments[-1]) < left and not attempt(folder, moment := rng.uniform(0.0, seconds)):
            moments[-1].append(moment)  # the rest of a run takes less time than the whole
        killed = the_run(folder)
        assert (killed / "final_model").exists() or attempt(folder)
        assert_same(killed, whole)
        assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
        assert [c.name for c in list_checkpoints(killed)] == [c.name for c in list_checkpoints(whole)], moments


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


def test_a_checkpoint_holds_nothing_that_runs_code(stopped: Path) -> None:
    """Weights as safetensors; everything else loads with weights_only."""
    checkpoint = list_checkpoints(stopped)[0]
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
