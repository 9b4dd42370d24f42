"""Looks at a user's lm-eval task files before lm-eval does, which passes over what it cannot read in silence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from dtfcli.errors import ConfigError, DTFError, reading, reason_of

_LARGEST = 2**20
"""Bytes; lm-eval's own largest task file has a hundredth of that."""
_MEND = "mend the task file, or take it out of --include-path"


class _Loader(yaml.SafeLoader):
    """Reads what a task file says, without importing the functions that it names."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def check_task_files(folder: Path) -> None:
    """Check that all task files of a folder can be read, and that none leads out of it.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    root = folder.resolve()
    for path in sorted(folder.rglob("*.yaml")):
        with reading(path, _MEND, ConfigError, also=(yaml.YAMLError,)):
            if not path.resolve(strict=True).is_relative_to(root):
                raise ConfigError(f"{path}: a link out of its folder, which is not followed; copy the file there.")
            if path.stat().st_size > _LARGEST:
                raise ConfigError(f"{path}: too large for a task file; {_MEND}.")
            task = yaml.load(path.read_text("utf-8"), _Loader)
        if not isinstance(task, dict):
            raise ConfigError(f"{path}: holds no settings of a task; {_MEND}.")
        for name, fits in (("task", _names), ("group", _name), ("tag", _names), ("include", _name)):
            if not fits(task.get(name, "x")):
                raise ConfigError(f"{path}: {name} = {str(task[name])[:40]!r}: not a name; {_MEND}.")
        if "include" in task and not (path.parent / task["include"]).resolve().is_relative_to(root):
            raise ConfigError(f"{path}: include = {task['include']!r} leads out of its folder; copy that file there.")


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _names(value: Any) -> bool:
    return _name(value) or (isinstance(value, list) and all(isinstance(item, str | dict) for item in value))


@contextmanager
def explained_task_errors(name: str, entry: Any, data: Path | None) -> Iterator[None]:
    """Turn what a task's file or data raise inside lm-eval into one line.

    Args:
        name: of the task.
        entry: lm-eval's record of it.
        data: the folder of datasets; None: not given.

    Raises:
        ConfigError: names the task, its file and the remedy.
    """
    try:
        yield
    except DTFError:
        raise
    except Exception as error:  # a mistake in a task file can raise anything
        raise _explained(name, entry, data, error) from error


def _explained(name: str, entry: Any, data: Path | None, error: Exception) -> ConfigError:
    path = getattr(entry, "yaml_path", None)
    places = [str(place) for place in (path, data) if place is not None]
    remedy = f"mend {' or its data in '.join(places)}, or leave the task out" if places else "leave the task out"
    return ConfigError(
        f"--tasks {name}: the task cannot be loaded. {type(error).__name__}: {reason_of(error)}; {remedy}."
    )
