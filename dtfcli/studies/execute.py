"""Trains what is missing of a study: finished runs are reused, runs that were stopped go on from their checkpoint.

A run is found by the end of its name, which is a hash of its settings. One run at a time trains in this process;
several at once are processes of `dtf train`, whose logs lie in `logs/` of the study.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtfcli.errors import DTFError
from dtfcli.experiment import train
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import FINAL_MODEL, METRICS_FILE, SETTINGS_FILE
from dtfcli.settings import Settings
from dtfcli.studies.grid import KEY_LENGTH, PlannedRun
from dtfcli.training.events import TrainEvent

State = Literal["waiting", "submitted", "training", "finished", "reused"]
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """The state of a run of the study; `loss` is its latest training loss, in nats."""

    run: PlannedRun
    state: State
    step: int = 0
    total_steps: int = 0
    loss: float | None = None


OnProgress = Callable[[Progress], None]


def folder_of(settings: Settings) -> Path | None:
    """The folder of a study's run, of whatever day, also of another grid; None if it was never started."""
    folders = sorted(Path(settings.run.output_dir).expanduser().glob(f"*/*-{settings.run.name[-KEY_LENGTH:]}"))
    return max(folders, key=lambda folder: (folder / FINAL_MODEL).is_dir(), default=None)


def is_finished(run: PlannedRun) -> bool:
    """Whether the run has its final model."""
    folder = folder_of(run.settings)
    return folder is not None and (folder / FINAL_MODEL).is_dir()


def execute(runs: Sequence[PlannedRun], parallel: int, on_progress: OnProgress) -> None:
    """Train every run that is not finished.

    Args:
        runs: in the order in which they start.
        parallel: runs at once.
        on_progress: called whenever a run starts, moves on or ends.

    Raises:
        DTFError: a run failed; the others are stopped and go on when the study is started again.
    """
    missing = []
    for run in runs:
        if is_finished(run):
            on_progress(Progress(run, "reused"))
        else:
            missing.append(run)
    if parallel == 1:
        for run in missing:
            _train_here(run, on_progress)
    else:
        _train_apart(missing, parallel, on_progress)


def _started(settings: Settings) -> Path | None:
    """The folder of a run that `--resume` takes (which refuses one that another process trains); None: it has none."""
    folder = folder_of(settings)
    return folder if folder is not None and (folder / SETTINGS_FILE).is_file() else None


def _train_here(run: PlannedRun, on_progress: OnProgress) -> None:
    on_progress(Progress(run, "training"))
    loss: float | None = None

    def listen(event: TrainEvent) -> None:
        nonlocal loss
        loss = event.metrics.get("train/loss", loss)
        if event.kind in ("step", "evaluation"):
            on_progress(Progress(run, "training", event.step, event.total_steps, loss))

    train(run.settings, resume=_started(run.settings), rename=False, on_event=listen)
    on_progress(Progress(run, "finished", loss=loss))


@dataclass
class _Worker:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: Path


def _train_apart(runs: Sequence[PlannedRun], parallel: int, on_progress: OnProgress) -> None:
    waiting, workers = list(runs), list[_Worker]()
    try:
        while waiting or workers:
            while waiting and len(workers) < parallel:
                workers.append(_start(waiting.pop(0), parallel))
                on_progress(Progress(workers[-1].run, "training"))
            time.sleep(_POLL_SECONDS)
            for worker in list(workers):
                code = worker.process.poll()
                if code is None:
                    on_progress(progress_of(worker.run))
                    continue
                workers.remove(worker)
                if code != 0 or not is_finished(worker.run):
                    last = worker.log.read_text("utf-8", errors="replace").strip().splitlines()[-3:]
                    raise DTFError(f"{worker.run.settings.run.name} failed (log: {worker.log}). " + " ".join(last))
                on_progress(Progress(worker.run, "finished"))
    finally:
        for worker in workers:
            worker.process.terminate()  # each saves a checkpoint
        for worker in workers:
            worker.process.wait()


def _start(run: PlannedRun, parallel: int) -> _Worker:
    log = Path(run.settings.run.output_dir).expanduser() / "logs" / f"{run.settings.run.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with log.open("wb") as file:
        process = subprocess.Popen(
            train_command(run.settings),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))},
        )
    return _Worker(run, process, log)


def train_command(settings: Settings) -> list[str]:
    """The command that begins a run, or goes on with it from its checkpoint."""
    started = _started(settings)
    if started is not None:
        trusted = ["--trust-remote-code"] if settings.model.trust_remote_code else []
        return [sys.executable, "-m", "dtfcli", "train", "--resume", str(started), *trusted]
    config = Path(settings.run.output_dir).expanduser() / "configs" / f"{settings.run.name}.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(settings.to_toml(), "utf-8")
    return [sys.executable, "-m", "dtfcli", "train", "--config", str(config)]


def progress_of(run: PlannedRun) -> Progress:
    """The progress of a run that trains elsewhere, by its metrics."""
    folder = folder_of(run.settings)
    lines = read_metrics(folder / METRICS_FILE) if folder is not None and (folder / METRICS_FILE).is_file() else []
    last: dict[str, Any] = next((line for line in reversed(lines) if "train/loss" in line), {})
    return Progress(
        run, "training", int(last.get("step", 0)), run.settings.training.max_steps or 0, last.get("train/loss")
    )
