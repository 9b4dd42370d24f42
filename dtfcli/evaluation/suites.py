"""Turns `--tasks` (suites, lm-eval tasks and groups) into jobs.

lm-eval runs and aggregates a job in one go: a task, or a whole group such as mmlu. Names are looked up in lm-eval's
index of task files, extended by our own (`tasks/`, the code benchmarks) and the user's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from dtfcli.errors import ConfigError, did_you_mean
from dtfcli.evaluation.task_files import check_task_files

VALIDATION_TEXT = "validation_text"
"""A task of our own: the text that a run held out."""

OWN_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Job:
    """A task, group or tag to run in one go.

    Attributes:
        shots: few-shot examples; None: the task's own number.
        limit: items of each task; None: all.
        optional: leave it out, with a warning, if its data is not available.
    """

    name: str
    shots: int | None = None
    limit: int | None = None
    optional: bool = False


SUITES: dict[str, tuple[Job, ...]] = {
    "general": (
        *(Job("arc_challenge", 25), Job("hellaswag", 10), Job("mmlu", 5)),
        *(Job("winogrande", 5), Job("truthfulqa_mc2", 0)),
    ),
    "math": (Job("gsm8k", 5), Job("mathqa", 0, optional=True)),
    "code": (Job("humaneval", 0), Job("mbpp", 3)),
    "quick_test": (Job("arc_challenge", 0, 200), Job("hellaswag", 0, 200)),
    "perplexity": (Job("wikitext", 0), Job(VALIDATION_TEXT, optional=True)),
}

_SUITE_FOLDERS = ("arc", "gsm8k", "hellaswag", "mathqa", "mmlu/default", "truthfulqa", "wikitext", "winogrande")
"""lm-eval's folders with the suites' tasks; reading its other 14,000 task files takes several seconds."""


def plan_jobs(
    names: Sequence[str], index: "TaskIndex", shots: int | None = None, limit: int | None = None
) -> list[Job]:
    """The jobs behind names of suites, tasks, groups and tags; `shots` and `limit` are for every job.

    Raises:
        ConfigError: a name is unknown, or two names contain the same task.
    """
    jobs: list[Job] = []
    seen: dict[str, str] = {}
    for name in names:
        for job in SUITES.get(name, (Job(name),)):
            index.require(job.name)
            job = replace(job, shots=job.shots if shots is None else shots, limit=job.limit if limit is None else limit)
            if job in jobs:
                continue
            for leaf, _ in index.leaves(job.name):
                if leaf in seen:
                    raise ConfigError(
                        f"--tasks: {leaf} is in both {seen[leaf]} and {name}, with different shots or limits. Run them "
                        "one after the other."
                    )
                seen[leaf] = name
            jobs.append(job)
    return jobs


class TaskIndex:
    """All known tasks, with the content of their files."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None, trusted: bool = False) -> None:
        """Read the task files of the suites; read all of lm-eval's only if `names` has other tasks.

        Args:
            names: suites, tasks, groups, tags.
            include_path: a folder of more task files.
            trusted: whether these may name Python code.

        Raises:
            ConfigError: `include_path` is not a folder of task files, or one of these names code without trust.
        """
        mine = [] if include_path is None else [include_path]
        for folder in mine:
            check_task_files(folder, trusted)
        root = Path(lm_eval.__file__).parent / "tasks"
        folders = [root / name for name in _SUITE_FOLDERS]
        self.manager = TaskManager(include_defaults=False, include_path=[*folders, OWN_TASKS, *mine])
        wanted = {job.name for name in names for job in SUITES.get(name, (Job(name),))} - {VALIDATION_TEXT}
        if not wanted <= set(self.manager.task_index):
            self.manager = TaskManager(include_path=[OWN_TASKS, *mine])

    def require(self, name: str) -> None:
        """Check that a task, group or tag exists.

        Raises:
            ConfigError: it does not.
        """
        if name == VALIDATION_TEXT or name in self.manager.task_index:
            return
        hint = did_you_mean(name, [*SUITES, *self.manager.task_index])
        remedy = hint or f" Suites are {', '.join(SUITES)}; `lm-eval ls tasks` lists the tasks."
        raise ConfigError(f"--tasks {name}: not a suite, task or group.{remedy}")

    def leaves(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The leaf tasks of a task, group or tag, each with the content of its file."""
        entry = self.manager.task_index.get(name)
        if entry is None:  # validation text, or a task written out inside its group
            yield name, {}
            return
        members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
        if isinstance(members, list):
            for member in members:
                if isinstance(member, str):
                    yield from self.leaves(member)
                elif isinstance(member.get("task"), list):
                    for inner in member["task"]:
                        yield from self.leaves(inner if isinstance(inner, str) else str(inner.get("task")))
                else:
                    yield from self.leaves(str(member.get("task") or member.get("group")))
        elif entry.kind.name == "TAG":
            for member in sorted(entry.tags):
                yield from self.leaves(member)
        else:
            yield name, entry.cfg or {}
