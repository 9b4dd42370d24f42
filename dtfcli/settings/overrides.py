"""Settings typed by hand: KEY=VALUE on the command line and DTF_… in the environment.

Both become nested tables of plain values. A value is read as JSON, then as TOML, and is otherwise text, so
`training.max_steps=200`, `model.routed_layers=[1,3,5]` and `data.sources='[{path="novels.parquet"}]'` all do
what they look like. Where the schema wants text the value is taken as typed (`run.name=007`).
"""

import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dtfcli.errors import ConfigError

ENVIRONMENT_PREFIX = "DTF_"
NOT_SETTINGS = ("DTF_SHARED", "DTF_SMOLLM2")
"""Variables of this project's own tests: where measuring data and a real checkpoint lie."""

WantsText = Callable[[list[str]], bool]


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


def assign(values: dict[str, Any], parts: list[str], value: Any) -> None:
    """Set the nested key `parts`, making tables (and replacing what is not a table) on the way."""
    for part in parts[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[parts[-1]] = value


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None where it is absent."""
    current: Any = values
    for part in key.split("."):
        if not isinstance(current, Mapping) or part not in current:
            return None
        current = current[part]
    return current


def remove(values: dict[str, Any], key: str) -> None:
    """Delete a dotted key, if it is there."""
    *parents, last = key.split(".")
    for part in parents:
        child = values.get(part)
        if not isinstance(child, dict):
            return
        values = child
    values.pop(last, None)


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
    value = parse_value(text)
    if parts == ["model"] and isinstance(value, str):
        parts = ["model", "architecture"]
    if wants_text(parts) and not isinstance(value, str):
        value = text
    assign(values, parts, value)


def parse_overrides(overrides: Iterable[str], wants_text: WantsText) -> dict[str, Any]:
    """Turn `KEY=VALUE` strings into a nested table; later ones win.

    Args:
        overrides: such as `training.max_steps=200`; `model=mod` is short for `model.architecture=mod`.
        wants_text: whether the schema expects text at a key.

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


def parse_environment(wants_text: WantsText, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Turn `DTF_TRAINING__MAX_STEPS=200` and the like into a nested table.

    Every variable that begins with DTF_ counts, so that a misspelt one is refused like any unknown key.
    """
    values: dict[str, Any] = {}
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name not in NOT_SETTINGS:
            parts = name[len(ENVIRONMENT_PREFIX) :].lower().split("__")
            _set_typed(values, parts, text, wants_text)
    return values
