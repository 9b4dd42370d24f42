"""Runs of a study as jobs of a cluster, by submitit: one array; submitted, left, and asked again later.

A job trains one run by the command that this machine would use. Whoever starts the study again looks at the jobs:
finished runs are reused, others are waited for, and what has no job is submitted. When a job's time runs out, or
another takes its place, training saves a checkpoint, and the job goes back into the queue and continues from it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from dtfcli.errors import ConfigError, DTFError, did_you_mean
from dtfcli.settings import Settings
from dtfcli.studies.execute import Progress, is_finished, look_at, train_command
from dtfcli.studies.grid import PlannedRun

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
_REQUEUES = 20

_DEFAULTS = {"slurm": {"gpus": "1", "time": "24:00:00"}, "local": {"time": "24:00:00"}}
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")


class TrainJob:
    """What a job does; submitit pickles it."""

    def __init__(self, settings: str, processes: int) -> None:
        """Args: settings of the run as JSON; processes that train it together, one for each GPU."""
        self.settings, self.processes = settings, processes

    def __call__(self) -> None:
        """Train the run, or go on with it.

        Raises:
            RuntimeError: training failed; the job's log says how.
        """
        several = ["--num-processes", str(self.processes)] if self.processes > 1 else []
        _Child.process = subprocess.Popen([*train_command(Settings.model_validate_json(self.settings)), *several])
        while (code := _Child.process.poll()) is None:  # `wait` would hold a lock that `checkpoint` needs
            time.sleep(_POLL_SECONDS)
        if code:
            raise RuntimeError(f"dtf train ended with exit code {code}")

    def checkpoint(self) -> Any:
        """Before the job is put back into the queue: training saves what it has; the next try begins with that."""
        from submitit.helpers import DelayedSubmission

        if _Child.process is not None:
            _Child.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _Child.process.wait(_SAVE_SECONDS)
        return DelayedSubmission(TrainJob(self.settings, self.processes))


class _Child:
    """The training process of this job; not part of what is pickled."""

    process: subprocess.Popen[bytes] | None = None


def parse_options(cluster: str, texts: Sequence[str]) -> dict[str, Any]:
    """What submitit is to be told, from `KEY=VALUE`.

    Raises:
        ConfigError: an unknown cluster or key, a value of another kind, or a key given twice.
    """
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
        given[key] = value
    return {OPTIONS[key]: _read(key, value) for key, value in (_DEFAULTS[cluster] | given).items()}


def _read(key: str, value: str) -> Any:
    if key == "time":
        found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+)(?::(\d\d))?", value)
        if found is None or (found[4] and not found[2]):
            raise ConfigError(f"--cluster-option time={value}: write minutes, H:MM, H:MM:SS or D-H:MM:SS.")
        days, hours, minutes = (int(part or 0) for part in found.groups()[:3])
        return (24 * days + hours) * 60 + minutes
    if key in ("gpus", "cpus", "memory"):
        if not value.isdecimal():
            raise ConfigError(f"--cluster-option {key}={value}: a whole number{' of GB' * (key == 'memory')}.")
        return int(value)
    return value


def submit(
    runs: Sequence[PlannedRun], cluster: str, options: Mapping[str, Any], output: Path, at_once: int | None = None
) -> list[Progress]:
    """Look at the jobs of a study, submit those that are missing, and say how far each run is.

    Args:
        runs: of the study.
        cluster: one of `Cluster`.
        options: from `parse_options`.
        output: folder of the study; logs and numbers of the jobs go to `jobs/` in it.
        at_once: how many jobs may run at a time; None: as many as the cluster lets.

    Raises:
        ConfigError: submitit is missing, or the cluster's commands are.
        DTFError: a job ended without its run being finished. It is submitted again the next time.
    """
    folder = (output / "jobs").absolute()
    file = folder / "jobs.json"
    jobs: dict[str, str] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    states, missing, failed = [], [], []
    for run in runs:
        name = run.settings.run.name
        if is_finished(run):
            states.append(Progress(run, "reused"))
        elif name not in jobs:
            missing.append(run)
            states.append(Progress(run, "submitted"))
        elif _is_alive(cluster, folder, jobs[name]):
            seen = look_at(run)
            states.append(seen if seen.step else replace(seen, state="waiting"))
        else:
            failed.append(f"{name} (log: {_log(cluster, folder, jobs.pop(name))})")
    if missing:
        jobs |= _submit_all(missing, cluster, options, folder, at_once)
    if missing or failed:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(jobs, indent=1) + "\n", "utf-8")
    if failed:
        raise DTFError(f"{', '.join(failed)}: ended before it was finished. Start the study again to submit it again.")
    return states


def _submit_all(
    runs: Sequence[PlannedRun], cluster: str, options: Mapping[str, Any], folder: Path, at_once: int | None
) -> dict[str, str]:
    """One array of all runs; returns the number of each run's job."""
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster, slurm_max_num_timeout=_REQUEUES)
    except RuntimeError as error:
        raise ConfigError(f"--cluster {cluster}: {error}. Start it on a machine that can submit jobs.") from error
    executor.update_parameters(name="dtf-compare", slurm_array_parallelism=at_once or len(runs), **options)
    processes = max(1, options.get("gpus_per_node", 1))
    with executor.batch():
        jobs = [executor.submit(TrainJob(run.settings.model_dump_json(), processes)) for run in runs]
    return {run.settings.run.name: job.job_id for run, job in zip(runs, jobs, strict=True)}


def _job(cluster: str, folder: Path, number: str) -> Any:
    submitit = _submitit()
    return (submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob)(folder=folder / "%j", job_id=number)


def _log(cluster: str, folder: Path, number: str) -> Path:
    return Path(_job(cluster, folder, number).paths.stderr)


def _is_alive(cluster: str, folder: Path, number: str) -> bool:
    """Whether a job waits or runs. The number of a local one is that of its process."""
    job = _job(cluster, folder, number)
    if cluster == "slurm":
        return not str(job.state).startswith(_ENDED)
    if job.paths.result_pickle.exists():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    return True


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--cluster needs submitit: pip install 'dtfcli[cluster]'.") from error
    return submitit
