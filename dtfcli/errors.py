"""Errors that end a command with one or two lines instead of a traceback.

A message names the field or file, its value, and the remedy. The exit codes are those of the command line: 1 failed
while running, 2 the user's input is wrong. `reading` turns the errors of a damaged file into such ones.
JSON is read and made plain here, too, because every room needs it.
"""

import difflib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


class DTFError(Exception):
    """Anything that goes wrong in a way the user can understand."""

    exit_code = 1


class ConfigError(DTFError):
    """A setting, option, preset or prompt is wrong."""

    exit_code = 2


class DataError(DTFError):
    """Training or evaluation text cannot be used as given."""

    exit_code = 2


class CheckpointError(DTFError):
    """A model folder, checkpoint or GGUF file cannot be used as given."""

    exit_code = 2


class HubError(DTFError):
    """The Hugging Face Hub refused or could not be reached."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest candidate, or "" when none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


BROKEN: tuple[type[Exception], ...] = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, NameError, EOFError, ImportError, struct.error),
)
"""Errors of reading a damaged file, here and in most libraries; nesting without end is a RuntimeError."""
_LARGEST_JSON = 2**26
"""Bytes. No configuration or report comes near; parsed, it would take up to twenty times as much."""


def reason_of(error: BaseException) -> str:
    """An error in one line, without a period."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # "Validation error for field 'x':" says nothing without the line after it.
    reason = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return reason[:300].rstrip(".") or type(error).__name__


@contextmanager
def reading(
    path: Path | str,
    remedy: str,
    error: type[DTFError] = CheckpointError,
    also: tuple[type[Exception], ...] = (),
    what: str = "cannot be read",
) -> Iterator[None]:
    """Turn the errors of reading a damaged file into one line that names it and the remedy.

    Args:
        path: the file, or its name in the message.
        remedy: such as "save the model again".
        error: the kind of error to raise.
        also: further exceptions, of the library that reads.
        what: the problem, in words.
    """
    try:
        yield
    except DTFError:
        raise
    except (*BROKEN, *also) as problem:
        raise error(f"{path}: {what} ({reason_of(problem)}); {remedy}.") from problem


def leads_out(folder: Path, file: Path) -> bool:
    """Whether a file is a link to a place outside its folder; the Hub's cache, which is made of links, is inside.

    Raises:
        OSError, RuntimeError: it leads nowhere, or to itself.
    """
    if not file.is_symlink():
        return False
    target, root = file.resolve(strict=True), folder.resolve()
    in_cache = "snapshots" in root.parts and target.parent.name == "blobs"
    if in_cache:
        cache = Path(*root.parts[: len(root.parts) - 1 - root.parts[::-1].index("snapshots")])
        in_cache = target.is_relative_to(cache / "blobs")
    return not in_cache and not target.is_relative_to(root)


def read_json_object(path: Path, remedy: str, error: type[DTFError] = CheckpointError) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        DTFError: of the kind `error`; it is missing, too large, not UTF-8, no JSON, or something else than an object.
    """
    with reading(path, remedy, error, what="cannot be read as JSON"):
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise error(f"{path}: {size} bytes, too large for a file of its kind; {remedy}.")
        document = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(document, dict):
        raise error(f"{path}: holds no JSON object but {type(document).__name__}; {remedy}.")
    return document


def plain(value: Any) -> Any:
    """As JSON takes it: dataclasses and mappings as objects, sequences as lists, NaN and infinity null, else text."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
