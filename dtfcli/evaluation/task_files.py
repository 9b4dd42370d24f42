"""Checks a user's lm-eval task files before lm-eval reads them, which passes over a damaged file in silence.

A task file can come from a stranger, and there are several ways for one to name code: `!function` imports a Python file
beside it, a metric that lm-eval does not have is a script of the Hub or of a folder, a dataset can be a pickle, and
`custom_generate` is a Python file again. Without trust such a file is refused. Templates always run in Jinja's sandbox,
which lm-eval does without: they see text and numbers, and no way from there into Python.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # noqa: F401  # registers the metrics
import yaml  # type: ignore[import-untyped]
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from jinja2 import BaseLoader, StrictUndefined
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils as lm_utils
from lm_eval.api.registry import metric_registry

from dtfcli.errors import ConfigError, DTFError, reading, reason_of

_LARGEST = 2**20
"""Bytes; lm-eval's own largest task file has a hundredth of that."""
_MEND = "mend the task file, or take it out of --include-path"
_PLAIN_FORMATS = ("arrow", "csv", "json", "parquet", "text", "xml")
"""What `datasets` reads without running anything; "pandas", among others, opens pickles."""
_TRUSTED = "take it out, or read that code and add --trust-remote-code"


@dataclass(frozen=True)
class _Code:
    """What a tag such as `!function` names."""

    tag: str
    name: str


class _Loader(yaml.SafeLoader):
    """Reads what a task file says, without importing the functions that it names."""


_Loader.add_multi_constructor("!", lambda _, suffix, node: _Code(f"!{suffix}", str(node.value)))


def check_task_files(folder: Path, trusted: bool = False) -> None:
    """Check that all task files of a folder can be read, that none leads out of it, and that none names code.

    Args:
        folder: of `--include-path`.
        trusted: whether they may name code.

    Raises:
        ConfigError: it is no such folder, or the file with its problem.
    """
    if not folder.is_dir():
        raise ConfigError(f"--include-path {folder}: no such folder; give one with .yaml task files.")
    root = folder.resolve()
    waiting, seen = sorted(folder.rglob("*.yaml"), reverse=True), set[Path]()
    if not waiting:
        raise ConfigError(f"--include-path {folder}: has no .yaml task files.")
    while waiting:
        path = waiting.pop()
        task = _read(root, path)
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        if "include" in task:
            waiting.append(path.parent / task["include"])  # of any ending
        if not trusted:
            _refuse_code(path, task)


def _read(root: Path, path: Path) -> dict[Any, Any]:
    """The content of a task file."""
    with reading(path, _MEND, ConfigError, also=(yaml.YAMLError,)):
        if not path.resolve(strict=True).is_relative_to(root):
            raise ConfigError(f"{path}: a link out of its folder, which is not followed; copy the file there.")
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path}: too large for a task file; {_MEND}.")
        task = yaml.load(path.read_text("utf-8"), _Loader)
    if not isinstance(task, dict):
        raise ConfigError(f"{path}: holds no settings of a task; {_MEND}.")
    for name, kinds in (("task", str | list), ("tag", str | list), ("group", str), ("include", str)):
        value = task.get(name, "x")
        members = value if isinstance(value, list) else [value]
        if value == "" or not isinstance(value, kinds) or not all(isinstance(item, str | dict) for item in members):
            raise ConfigError(f"{path}: {name} = {str(value)[:40]!r}: not a name; {_MEND}.")
    if "include" in task and not (path.parent / task["include"]).resolve().is_relative_to(root):
        raise ConfigError(f"{path}: include = {task['include']!r} leads out of its folder; copy that file there.")
    return task


def _refuse_code(path: Path, task: dict[Any, Any]) -> None:
    """Refuse everything by which a task file can have code run.

    Raises:
        ConfigError: names file, key and remedy.
    """
    if "class" in task:
        raise ConfigError(f"{path}: class: a task written in Python, which is not run; {_TRUSTED}.")
    for key, value in _entries(task):
        shown, reason = repr(str(value)[:80]), _reason(key.rpartition(".")[2], value)
        if isinstance(value, _Code):
            shown, reason = f"{value.tag} {value.name}"[:80], "names Python code, which is not run"
        if reason:
            raise ConfigError(f"{path}: {key} = {shown}: {reason}; {_TRUSTED}.")


def _reason(key: str, value: Any) -> str:
    """Why an entry can have code run; "": it cannot."""
    text = str(value)
    foreign = text in _PACKAGED_DATASETS_MODULES and text not in _PLAIN_FORMATS
    reasons: dict[str, Any] = {
        "metric": isinstance(value, str)
        and value not in metric_registry
        and "lm-eval has no such metric, and would run a script of this name",
        "hf_evaluate": value is not False and "the metric is a script, which is not run",
        "dataset_path": (foreign and f"this format may hold code, unlike {', '.join(_PLAIN_FORMATS)}")
        or (text.endswith(".py") and "a Python file, which is not run"),
        "custom_generate": "names Python code, which is not run",
        "use_prompt": not text.startswith("qa-basic:") and "loads templates from an unchecked place",
        "unsafe_code": "a task file does not decide whether code of the model is run",
    }
    return reasons.get(key) or ""


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a document, with its place, as in `metric_list.0.metric`."""
    yield key, value
    children: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        if isinstance(name, _Code):
            yield f"{key}.{name.tag}".lstrip("."), name
        else:
            yield from _entries(child, f"{key}.{name}".lstrip("."))


_SANDBOX = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
_SANDBOX.filters["regex_replace"] = lm_utils.regex_replace


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Let lm-eval's templates run in a sandbox.

    Raises:
        ConfigError: a template reaches for something that is not in its document.
    """
    stock = lm_utils.env
    lm_utils.env = _SANDBOX
    try:
        yield
    except SecurityError as error:
        raise ConfigError(f"a template of the task leads into Python ({reason_of(error)}); mend its file.") from error
    finally:
        lm_utils.env = stock


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
        places = [str(place) for place in (getattr(entry, "yaml_path", None), data) if place is not None]
        remedy = f"mend {' or its data in '.join(places)}, or leave the task out" if places else "leave the task out"
        raise ConfigError(
            f"--tasks {name}: the task cannot be loaded. {type(error).__name__}: {reason_of(error)}; {remedy}."
        ) from error
