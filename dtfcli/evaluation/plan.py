"""What to evaluate, checked before a model is loaded: names, numbers, folders, and whether code may be run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtfcli.errors import ConfigError
from dtfcli.evaluation.harness import quiet
from dtfcli.evaluation.suites import Job, TaskIndex, plan_jobs, split_names


class NotConfirmed(ConfigError):
    """A task runs code that the model writes, and nobody has allowed it."""


@dataclass(frozen=True)
class EvalPlan:
    """What to run and how, checked.

    Attributes:
        names: as they were asked for.
        jobs: in order.
        index: of the tasks there are.
        limit, num_fewshot, batch_size: as asked for; None: each task's own, or what fits.
        data_dir: datasets on this machine.
        unsafe_code: whether code that the model writes may be run.
        verbose: let lm-eval talk.
    """

    names: tuple[str, ...]
    jobs: tuple[Job, ...]
    index: TaskIndex
    limit: int | None
    num_fewshot: int | None
    batch_size: int | None
    data_dir: Path | None
    unsafe_code: bool
    verbose: bool


def make_plan(
    tasks: str | Sequence[str] = "quick_test",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    confirm_run_unsafe_code: bool = False,
    verbose: bool = False,
) -> EvalPlan:
    """Check what was asked for, without a model or data.

    Raises:
        ConfigError: a name, folder or number is wrong.
        NotConfirmed: a task would run code unasked.
    """
    names = split_names(tasks)
    for option, value, least in (("--limit", limit, 1), ("--num-fewshot", num_fewshot, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"{option} {value}: a whole number of at least {least}.")
    rows = _rows(batch_size)
    folder = Path(data_dir).expanduser() if data_dir is not None else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--data-dir {data_dir}: no such folder; it holds datasets as OWNER/NAME/….")
    with quiet(verbose):
        index = TaskIndex(names, Path(include_path).expanduser() if include_path is not None else None)
    jobs = plan_jobs(names, index, num_fewshot, limit)
    unsafe = [leaf for job in jobs for leaf, config in index.configs(job.name) if config.get("unsafe_code")]
    if unsafe and not confirm_run_unsafe_code:
        raise NotConfirmed(
            f"--tasks {', '.join(unsafe)}: runs code that the model writes, in a sandbox; add "
            "--confirm-run-unsafe-code to allow it."
        )
    return EvalPlan(
        names=tuple(names),
        jobs=tuple(jobs),
        index=index,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=rows,
        data_dir=folder,
        unsafe_code=confirm_run_unsafe_code,
        verbose=verbose,
    )


def _rows(batch_size: int | str) -> int | None:
    """Rows of a batch; None for "auto"."""
    if batch_size == "auto":
        return None
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1 or isinstance(batch_size, bool):
        raise ConfigError(f"--batch-size {batch_size}: a whole number of at least 1, or auto.")
    return rows
