"""Where settings come from: KEY=VALUE overrides, DTF_… variables, TOML files and presets; all become nested tables.

A value of an override or a variable is read as JSON, then as TOML, and is otherwise text, so `training.max_steps=200`,
`model.routed_layers=[1,3,5]` and `data.sources='[{path="novels.parquet"}]'` work as they stand. Where the schema
wants text the value is taken as typed (`run.name=007`).

Presets are TOML files that come with the package: in the repository they lie in `presets/`, in an installed wheel in
`dtfcli/presets/`. The first line of a preset is a comment with its purpose.
"""

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtfcli.errors import ConfigError, did_you_mean, reason_of

ENVIRONMENT_PREFIX = "DTF_"
API_KEY = "DTF_API_KEY"
"""The one such variable that is no setting: the key of `dtf serve` and `dtf demo`."""

WantsText = Callable[[list[str]], bool]
"""Whether the schema expects text at a key."""


def parse_value(text: str) -> Any:
    """Read `text` as JSON, else as a TOML value, else leave it as text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None where it is absent."""
    current: Any = values
    for part in key.split("."):
        current = current.get(part) if isinstance(current, Mapping) else None
    return current


def remove(values: Any, key: str | Sequence[str | int]) -> bool:
    """Delete a nested key, dotted or in parts, from tables and lists; False when it is not there."""
    *parents, last = key.split(".") if isinstance(key, str) else key
    try:
        for part in parents:
            values = values[part]
        del values[last]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """A new table: `lower` with `upper` laid over it; tables merge, everything else is replaced."""
    merged = {key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in lower.items()}
    for key, value in upper.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def _set_typed(values: dict[str, Any], parts: list[str], text: str, wants_text: WantsText) -> None:
    """Set a nested key, making tables (and replacing other values) on the way."""
    value = parse_value(text)
    if parts == ["model"] and isinstance(value, str):
        parts = ["model", "architecture"]
    for part in parts[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[parts[-1]] = value if isinstance(value, str) or not wants_text(parts) else text


def parse_overrides(overrides: Iterable[str], wants_text: WantsText) -> dict[str, Any]:
    """Turn `KEY=VALUE` strings into a nested table; later ones win, and `model=mod` is `model.architecture=mod`.

    Raises:
        ConfigError: an item is not of the form KEY=VALUE.
    """
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"'{item}' is not KEY=VALUE. Write for example training.max_steps=200.")
        _set_typed(values, parts, text, wants_text)
    return values


def environment_name(key: str) -> str:
    """The environment variable of a dotted key: training.max_steps → DTF_TRAINING__MAX_STEPS."""
    return ENVIRONMENT_PREFIX + key.replace(".", "__").upper()


def parse_environment(wants_text: WantsText) -> dict[str, Any]:
    """Turn `DTF_TRAINING__MAX_STEPS=200` and so on into a nested table; misspelled ones are kept, to be refused."""
    values: dict[str, Any] = {}
    for name, text in sorted(os.environ.items()):
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name != API_KEY:
            parts = name[len(ENVIRONMENT_PREFIX) :].lower().split("__")
            _set_typed(values, parts, text, wants_text)
    return values


def presets_dir() -> Path:
    """The folder that holds the presets: inside the package in a wheel, next to it in the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in presets_dir().glob("*.toml"))


def preset_path(name: str) -> Path:
    """The file of a preset; ConfigError where no preset has this name."""
    names = preset_names()
    if name in names:
        return presets_dir() / f"{name}.toml"
    if name.endswith(".toml") or Path(name).is_file():
        raise ConfigError(f"'{name}' is a file, not a preset. Write --config {name} to use it.")
    hint = did_you_mean(name, names) or " `dtf presets list` shows them all."
    raise ConfigError(f"There is no preset '{name}'.{hint}")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a settings file.

    Raises:
        ConfigError: it is missing, unreadable, no text, or no TOML (with line and column).
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file. `dtf presets copy quickstart {path}` makes one to start from.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "give a TOML file" if path.is_dir() else "check its permissions"
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); give a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise ConfigError(f"{path}: not valid TOML: {reason_of(error)}; give a TOML file.") from error


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, as a nested table."""
    return read_toml(preset_path(name))


def preset_summary(name: str) -> str:
    """The purpose of a preset: its first line, which is a comment."""
    with preset_path(name).open(encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()


def copy_preset(name: str, target: Path) -> Path:
    """Copy a preset to `target` (a file, or a folder that exists) and return the new file.

    Raises:
        ConfigError: something is there already, or the folder is missing or not writable.
    """
    source = preset_path(name)
    if target.is_dir():
        target = target / source.name
    try:
        with source.open("rb") as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer)
    except FileExistsError as error:
        raise ConfigError(f"{target}: exists and is not overwritten. Choose another name.") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{target}: the folder {target.parent} does not exist. Make it first.") from error
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}). Choose another place.") from error
    return target
