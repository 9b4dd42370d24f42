"""Runs of a study as jobs of a cluster, by submitit: one array, which the next start of the study asks for its state.

A job trains one run by the command that this machine would use. The next start of the study reuses finished runs,
reports running jobs, and submits runs without a job. When a job's time runs out, or another job takes its place,
training saves a checkpoint, and the job goes back into the queue and continues from it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dtfcli.errors import ConfigError, DTFError, did_you_mean
from dtfcli.runs.folder import locked_file
from dtfcli.settings import Settings
from dtfcli.studies.execute import Progress, is_finished, progress_of, train_command
from dtfcli.studies.grid import PlannedRun
from dtfcli.training.loop import TrainingInterrupted

Cluster = Literal["slurm", "local"]

OPTIONS = {
    "partition": "slurm_partition",
    "account": "slurm_account",
    "qos": "slurm_qos",
    "constraint": "slurm_constraint",
    "gpus": "gpus_per_node",
    "cpus": "cpus_per_task",
    "memory": "mem_gb",
    "time": "timeout_min",
}
"""Options of a job, as users write them, and submitit's names."""

_POLL_SECONDS = 1.0
_SAVE_SECONDS = 60.0
"""How long training may take to save; Slurm kills the job 90 seconds after the warning."""
_PREEMPTION_SECONDS = 120.0
"""Between Slurm's SIGTERM and the signal that puts a job back into the queue."""
_REQUEUES = 20

_DEFAULTS = {"slurm": {"gpus": "1", "time": "24:00:00"}, "local": {"time": "24:00:00"}}
_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"),
    *("PREEMPTED", "REVOKED"),  # a job that goes back into the queue is PENDING again
)
_UNKNOWN_SECONDS = 600.0
"""Slurm's accounting takes a while to know a job; one that it does not know after this has long ended."""


class TrainJob:
    """The work of a job; submitit pickles it."""

    def __init__(self, settings: str, processes: int) -> None:
        """Args: settings of the run as JSON; processes that train it together, one for each GPU."""
        self.settings, self.processes = settings, processes
        self.devices = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __call__(self) -> None:
        """Train the run, or go on with it.

        Raises:
            RuntimeError: training failed; the job's log says how.
        """
        several = ["--num-processes", str(self.processes)] if self.processes > 1 else []
        command = [*train_command(Settings.model_validate_json(self.settings)), *several]
        _Child.process = subprocess.Popen(command, env=self._environment())
        while (code := _Child.process.poll()) is None:  # `wait` would hold a lock that `checkpoint` needs
            time.sleep(_POLL_SECONDS)
        if code == TrainingInterrupted.exit_code:  # by the same SIGTERM that Slurm sends before it preempts this job
            time.sleep(_PREEMPTION_SECONDS)  # its signal to go back into the queue interrupts this
        if code:
            raise RuntimeError(f"dtf train ended with exit code {code}")

    def _environment(self) -> dict[str, str]:
        """Submitit hides all devices from a local job; it shall see those of whoever submitted it."""
        here = dict(os.environ)
        if here.get("SUBMITIT_EXECUTOR") == "local":
            del here["CUDA_VISIBLE_DEVICES"]
            here |= {} if self.devices is None else {"CUDA_VISIBLE_DEVICES": self.devices}
        return here

    def checkpoint(self) -> Any:
        """Before the job is put back into the queue: training saves what it has; the next try begins with that."""
        from submitit.helpers import DelayedSubmission

        if _Child.process is not None:
            _Child.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _Child.process.wait(_SAVE_SECONDS)
        again = TrainJob(self.settings, self.processes)
        again.devices = self.devices
        return DelayedSubmission(again)


class _Child:
    """The training process of this job; not part of what is pickled."""

    process: subprocess.Popen[bytes] | None = None


def parse_options(cluster: str | None, texts: Sequence[str]) -> dict[str, Any]:
    """Submitit's parameters from `KEY=VALUE`; none without a cluster.

    Raises:
        ConfigError: an unknown cluster or key, a value of another kind, or a key given twice.
    """
    if cluster is None and texts:
        raise ConfigError(f"--cluster-option {texts[0]}: without --cluster nothing reads it; add --cluster slurm.")
    if cluster is None:
        return {}
    if cluster not in get_args(Cluster):
        raise ConfigError(f"--cluster {cluster}: choose from {', '.join(get_args(Cluster))}.")
    given: dict[str, str] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise ConfigError(f"--cluster-option {text}: write KEY=VALUE, such as partition=gpu or time=2:00:00.")
        if key not in OPTIONS:
            raise ConfigError(f"--cluster-option {text}: there is no option '{key}'.{did_you_mean(key, OPTIONS)}")
        if key in given:
            raise ConfigError(f"--cluster-option {text}: {key} is named twice; name it once.")
        if cluster == "local" and key != "time":
            raise ConfigError(f"--cluster-option {text}: local jobs have no {key}; only time is read.")
        given[key] = value
    return {OPTIONS[key]: _read(key, value) for key, value in (_DEFAULTS[cluster] | given).items()}


def _read(key: str, value: str) -> Any:
    if key == "time":
        match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+)(?::(\d\d))?", value)
        if match is None or (match[4] and not match[2]):
            raise ConfigError(f"--cluster-option time={value}: write minutes, H:MM, H:MM:SS or D-H:MM:SS.")
        days, hours, minutes = (int(part or 0) for part in match.groups()[:3])
        return (24 * days + hours) * 60 + minutes
    if key in ("gpus", "cpus", "memory"):
        if not value.isdecimal():
            raise ConfigError(f"--cluster-option {key}={value}: a whole number{' of GB' * (key == 'memory')}.")
        return int(value)
    return value


@dataclass(frozen=True)
class _Job:
    """A job: its number on the cluster (locally of its process), and when it was submitted, in seconds since 1970."""

    name: str
    cluster: str
    number: str
    submitted: float

    def handle(self, folder: Path) -> Any:
        """Submitit's object for it."""
        submitit = _submitit()
        kind = submitit.SlurmJob if self.cluster == "slurm" else submitit.LocalJob
        return kind(folder=folder / "%j", job_id=self.number)

    def is_alive(self, folder: Path) -> bool:
        """Whether it waits or runs."""
        handle = self.handle(folder)
        if self.cluster == "slurm":
            state = str(handle.state)
            unknown = state == "UNKNOWN" and time.time() - self.submitted > _UNKNOWN_SECONDS
            return not (unknown or state.startswith(_ENDED))
        if handle.paths.result_pickle.exists():
            return False
        try:
            os.kill(int(self.number), 0)
        except (ProcessLookupError, PermissionError):  # it ended, and its number may be another user's by now
            return False
        return True


def submit(
    runs: Sequence[PlannedRun], cluster: str, options: Mapping[str, Any], output: Path, at_once: int | None = None
) -> list[Progress]:
    """Submit the missing jobs of a study, and return the progress of each run.

    Args:
        runs: of the study.
        cluster: one of `Cluster`.
        options: from `parse_options`.
        output: folder of the study; logs and numbers of the jobs go to `jobs/` in it.
        at_once: how many jobs may run at a time; None: as many as the cluster lets.

    Raises:
        ConfigError: submitit or the cluster's commands are missing, or another process uses the same jobs.
        DTFError: a job ended without its run being finished. It is submitted again the next time.
    """
    if cluster == "local" and at_once is not None:
        raise ConfigError("--parallel: local jobs start at once; leave --cluster local out to train a few at a time.")
    folder = (output / "jobs").absolute()
    lock, file = folder / "lock", folder / "jobs.json"
    folder.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with locked_file(lock, f"{folder}: another `dtf compare` uses these jobs; try again when it has ended."):
        stored = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        jobs = {key: _Job(**job) for key, job in stored.items()}
        states = [_state(run, jobs.get(run.key), folder) for run in runs]
        missing = [state.run for state in states if state is not None and state.state == "submitted"]
        failed = [jobs.pop(run.key) for run, state in zip(runs, states, strict=True) if state is None]
        try:
            if missing:
                jobs |= _submit_all(missing, cluster, options, folder, at_once)
        finally:
            file.write_text(json.dumps({key: asdict(job) for key, job in jobs.items()}, indent=1) + "\n", "utf-8")
    if failed:
        names = ", ".join(f"{job.name} (log: {job.handle(folder).paths.stderr})" for job in failed)
        raise DTFError(f"{names}: ended before it was finished. Start the study again to submit it again.")
    return [state for state in states if state is not None]


def _state(run: PlannedRun, job: _Job | None, folder: Path) -> Progress | None:
    """The progress of a run; None if its job ended before the run was finished."""
    alive = job is not None and job.is_alive(folder)
    if is_finished(run):  # after the state of its job: it may have finished in between
        return Progress(run, "reused")
    if job is None:
        return Progress(run, "submitted")
    progress = progress_of(run)
    return (progress if progress.step else replace(progress, state="waiting")) if alive else None


def _submit_all(
    runs: Sequence[PlannedRun], cluster: str, options: Mapping[str, Any], folder: Path, at_once: int | None
) -> dict[str, _Job]:
    """One array of all runs; returns the job of each run by the run's key."""
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster, slurm_max_num_timeout=_REQUEUES)
        executor.update_parameters(name="dtf-compare", slurm_array_parallelism=at_once or len(runs), **options)
        processes = max(1, options.get("gpus_per_node", 1))
        with executor.batch():
            jobs = [executor.submit(TrainJob(run.settings.model_dump_json(), processes)) for run in runs]
    except submitit.core.utils.FailedJobError as error:
        raise DTFError(f"--cluster {cluster}: the jobs were refused. {error}") from error
    except RuntimeError as error:
        raise ConfigError(f"--cluster {cluster}: {error}. Start it on a machine that can submit jobs.") from error
    return {
        run.key: _Job(run.settings.run.name, cluster, job.job_id, time.time())
        for run, job in zip(runs, jobs, strict=True)
    }


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--cluster needs submitit: pip install 'dtfcli[cluster]'.") from error
    return submitit
