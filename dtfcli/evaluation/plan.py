"""Checks an evaluation before a model is loaded: task names, numbers, folders, and permission to run code."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtfcli.errors import ConfigError
from dtfcli.evaluation.suites import SUITES, Job, TaskIndex, plan_jobs
from dtfcli.quiet import quiet_libraries


class NotConfirmed(ConfigError):
    """A task runs code that the model writes, without permission."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        limit, num_fewshot: items of each task, examples in each prompt; None: each task's own number.
        batch_size: rows of a forward pass, or "auto" for what fits into memory.
        data_dir: a folder of datasets (`<owner>/<name>/…`), used instead of the Hub.
        include_path: a folder of lm-eval task files.
        confirm_run_unsafe_code: allow tasks that run code which the model writes.
        trust_remote_code: allow files of `include_path` to name Python code, which then runs.
        verbose: show what lm-eval prints.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    data_dir: str | Path | None = None
    include_path: str | Path | None = None
    confirm_run_unsafe_code: bool = False
    trust_remote_code: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class EvalPlan:
    """A checked evaluation.

    Attributes:
        names: of suites and tasks, as the user typed them.
        rows: of a batch; None: as many as fit into memory.
    """

    names: tuple[str, ...]
    jobs: tuple[Job, ...]
    index: TaskIndex
    rows: int | None
    data_dir: Path | None
    options: EvalOptions


def make_plan(tasks: str | Sequence[str] = "quick_test", options: EvalOptions | None = None) -> EvalPlan:
    """Check tasks and options, without a model or data.

    Raises:
        ConfigError: a name, folder or number is wrong.
        NotConfirmed: a task would run code without permission.
    """
    options = options or EvalOptions()
    parts = [tasks] if isinstance(tasks, str) else tasks
    names = [name.strip() for part in parts for name in part.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--tasks: names no task; give suites ({', '.join(SUITES)}) or lm-eval tasks with commas.")
    for option, value, least in (("--limit", options.limit, 1), ("--num-fewshot", options.num_fewshot, 0)):
        if value is not None:
            _whole(option, value, least)
    size = options.batch_size
    size = int(size) if isinstance(size, str) and size.isdecimal() else size
    rows = None if size == "auto" else _whole("--batch-size", size, 1, ", or auto")
    folder = Path(options.data_dir).expanduser() if options.data_dir is not None else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--data-dir {options.data_dir}: no such folder; it holds datasets as OWNER/NAME/….")
    include = Path(options.include_path).expanduser() if options.include_path is not None else None
    with quiet_libraries(verbose=options.verbose):
        index = TaskIndex(names, include, options.trust_remote_code)
    jobs = plan_jobs(names, index, options.num_fewshot, options.limit)
    unsafe = [leaf for job in jobs for leaf, config in index.leaves(job.name) if config.get("unsafe_code")]
    if unsafe and not options.confirm_run_unsafe_code:
        raise NotConfirmed(
            f"--tasks {', '.join(unsafe)}: runs code that the model writes, in a sandbox; add "
            "--confirm-run-unsafe-code to allow it."
        )
    return EvalPlan(tuple(names), tuple(jobs), index, rows, folder, options)


def _whole(option: str, value: int | str, least: int, otherwise: str = "") -> int:
    """A number that is whole and large enough.

    Raises:
        ConfigError: it is not whole, or less than `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{option} {value}: give a whole number of at least {least}{otherwise}.")
    return value
