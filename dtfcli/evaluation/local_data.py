"""Loads benchmarks from a folder instead of the Hub: `<data-dir>/<owner>/<name>/…`, the layout of their repositories.

An lm-eval task with a task file loads its dataset in `ConfigurableTask.download`, after its configuration is read and
before a split is used. Replacing this one method serves groups, tags and inline tasks alike, and turns the errors of
the dataset libraries into one line. Splits that a local copy lacks are removed from the task's configuration, because
lm-eval would load them even at 0 shots.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from dtfcli.errors import DataError, DTFError, leads_out, reading, reason_of

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Origin:
    """The source of a task's data.

    Attributes:
        dataset, config: its Hub id and configuration.
        source: "data-dir", "hub" (or its cache), or "task" for data that the task makes itself.
        missing_splits: splits that the task names and the local copy lacks.
        scored_instead: whether the scored split is missing, so that another one is scored.
    """

    dataset: str
    config: str | None
    source: str
    missing_splits: tuple[str, ...] = ()
    scored_instead: bool = False

    @property
    def name(self) -> str:
        """Dataset and configuration."""
        return self.dataset if self.config is None else f"{self.dataset} ({self.config})"


@contextmanager
def task_data(data_dir: Path | None) -> Iterator[dict[str, Origin]]:
    """Load the datasets that `data_dir` has from there; yields the origin of each, by task name.

    Raises (from inside lm-eval):
        DataError: a dataset is not available, or no split is left to score.
    """
    origins: dict[str, Origin] = {}
    original = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        name = str(task.config.task)
        path = task.DATASET_PATH
        folder = data_dir / path if data_dir is not None and path else None
        if callable(task.config.custom_dataset) or path is None:
            original(task, dataset_kwargs, **options)
            origins[name] = Origin(path or name, None, "task")
            return
        try:
            if folder is None or not folder.is_dir():
                original(task, dataset_kwargs, **options)
                origins[name] = Origin(path, task.DATASET_NAME, "hub")
                return
            _check_links(name, folder)
            kept = {k: v for k, v in (dataset_kwargs or {}).items() if k not in ("trust_remote_code", "revision")}
            kept["cache_dir"] = str(_cache_of(folder))
            task.dataset = datasets.load_dataset(str(folder), task.DATASET_NAME, **kept)
        except DTFError:
            raise
        except Exception as error:  # each library raises its own
            raise DataError(_unavailable(name, path, folder, data_dir, error)) from error
        wanted = evaluated_split(task)
        missing = _drop_missing_splits(task, folder)
        origins[name] = Origin(path, task.DATASET_NAME, "data-dir", missing, wanted in missing)

    ConfigurableTask.download = download
    try:
        yield origins
    finally:
        ConfigurableTask.download = original


def _check_links(task: str, folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        with reading(file, "put the file itself there", DataError):
            if leads_out(folder, file):
                raise DataError(f"{task}: {file}: a link out of its folder, not followed; copy the file there.")


def _cache_of(folder: Path) -> Path:
    """Where `datasets` caches what it makes of a folder, as it is now.

    Its own cache knows a folder that has a card by the folder's name alone: it would answer with the rows of another
    folder of this name, or with those of before a change.
    """
    files = sorted((str(file.relative_to(folder)), file.stat()) for file in folder.rglob("*") if file.is_file())
    state = [str(folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)]
    return Path(datasets.config.HF_DATASETS_CACHE) / "dtf" / sha256(repr(state).encode()).hexdigest()[:16]


def _unavailable(task: str, dataset: str, folder: Path | None, data_dir: Path | None, error: Exception) -> str:
    if folder is not None and folder.is_dir():
        reason = reason_of(error.__cause__ or error)
        return f"{task}: the dataset in {folder} cannot be read ({reason}); download it again, or leave the task out."
    places = [str(data_dir)] if data_dir is not None else []
    return (
        f"{task}: the dataset {dataset} is not available from {', '.join([*places, 'the local cache'])} or the Hub. "
        f"Give a folder that holds {dataset}/ with --data-dir, or check the network."
    )


def _drop_missing_splits(task: Any, folder: Path) -> tuple[str, ...]:
    """Remove the splits that a dataset lacks from its task's configuration."""
    config, fewshot = task.config, task.config.fewshot_config
    named = {getattr(config, field) for field in _SPLITS} | {fewshot.split}
    missing = {split for split in named if split is not None} - set(task.dataset)
    if not missing:
        return ()
    for field in _SPLITS:
        if getattr(config, field) in missing:
            setattr(config, field, None)
    if fewshot.split in missing:
        fewshot.split = None
    evaluated = evaluated_split(task)
    if evaluated is None:
        raise DataError(
            f"{config.task}: {folder} lacks the split {' and '.join(sorted(missing))} that the task is scored on; it "
            f"has {', '.join(sorted(task.dataset))}. Add the split there, or leave the task out."
        )
    if fewshot_split(task) == evaluated:
        # lm-eval leaves the item itself out of its examples only if both splits have the same name.
        config.test_split = fewshot.split = evaluated
    return tuple(sorted(missing))


def evaluated_split(task: Any) -> str | None:
    """The scored split of a task."""
    return task.config.test_split or task.config.validation_split


def fewshot_split(task: Any) -> str | None:
    """The split of few-shot examples, by lm-eval's rules; None: they come from the task file."""
    config, fewshot = task.config, task.config.fewshot_config
    if fewshot.split is not None:
        return fewshot.split
    if fewshot.samples is not None:
        return None
    return config.training_split or config.validation_split or config.test_split
