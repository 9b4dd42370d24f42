"""Which runs a study consists of: one for each point of the grid and each seed, equal in everything else.

A point that does not read an axis collapses: `model=dense` with two capacities is one point. Runs of one seed share the
initial backbone, the order of the data and what is held out, because these follow from the settings that they share.
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dtfcli.errors import ConfigError, did_you_mean
from dtfcli.models.configuration_fields import RoutingFields
from dtfcli.settings import Settings, load_settings
from dtfcli.settings.describe import flat_settings, show_value, walk
from dtfcli.settings.resolve import Sources, unread_keys

KEY_LENGTH = 8
"""Of the part of a run's key that its name ends with."""
POINT = "point"
"""The axis of points with names of their own."""
_RUN_KEYS = ("run.name", "run.output_dir", "run.seed")
"""Keys that the study sets for each run."""


@dataclass(frozen=True)
class Point:
    """A point of the grid.

    Attributes:
        name: such as "dtf 0.25".
        choices: its value on each axis that it reads; of a point with a name of its own, that name as `POINT`.
        overrides: all KEY=VALUE of its runs but the seed's.
    """

    name: str
    choices: dict[str, str]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run of the study; `key` is a hash of its settings, wherever and under whatever name they run."""

    point: Point
    seed: int
    settings: Settings
    key: str


def parse_axes(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Axes, key → values as typed, from `KEY=A,B,…`.

    Raises:
        ConfigError: not of that form, a key that does not exist, fewer than two values, or one of them twice.
    """
    axes: dict[str, tuple[str, ...]] = {}
    known = [key for key, _ in walk(Settings) if "[]" not in key]
    for text in texts:
        key, equals, values = text.partition("=")
        key = "model.architecture" if key.strip() == "model" else key.strip()
        if not equals or not key:
            raise ConfigError(f"--vary {text}: write KEY=A,B,…, such as model=dtf,mod or model.capacity=0.25,0.5.")
        if key in _RUN_KEYS:
            remedy = "use --seeds" if key == "run.seed" else "each run gets its own"
            raise ConfigError(f"--vary {text}: {key} is not an axis; {remedy}.")
        if key not in known:
            raise ConfigError(f"--vary {text}: there is no setting '{key}'.{did_you_mean(key, known)}")
        parts = _split(values)
        if len(parts) < 2:
            raise ConfigError(f"--vary {text}: one value is nothing to compare; give two or more, with commas.")
        if len(set(parts)) < len(parts):
            raise ConfigError(f"--vary {text}: a value is named twice; name each once.")
        if key in axes:
            raise ConfigError(f"--vary {text}: {key} is an axis already; give all its values in one --vary.")
        axes[key] = tuple(parts)
    if not axes:
        remedy = "such as --vary model=dtf,mod,random,layerdrop,dense, or points one by one with --point"
        raise ConfigError(f"--vary: name at least one axis, {remedy}.")
    return axes


def parse_points(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of points and their KEY=VALUE, from `NAME: KEY=VALUE …`, quoted as in a shell.

    Raises:
        ConfigError: not of that form, a key that belongs to the study, fewer than two points, or one of them twice.
    """
    points: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, colon, rest = text.partition(":")
        try:
            overrides = tuple(shlex.split(rest))
        except ValueError:
            overrides = ("",)
        if not colon or not name.strip() or not all("=" in item for item in overrides):
            raise ConfigError(f"--point {text}: write 'NAME: KEY=VALUE …', such as 'random: model=random'.")
        if reserved := [item for item in overrides if _key_of(item) in _RUN_KEYS]:
            raise ConfigError(f"--point {text}: {reserved[0]} differs from run to run anyway; leave it out.")
        if name.strip() in points:
            raise ConfigError(f"--point: two points are called {name.strip()}; give each its own name.")
        points[name.strip()] = overrides
    if len(points) == 1:
        raise ConfigError(f"--point {', '.join(points)}: one point is nothing to compare; give two or more.")
    return points


def _split(text: str) -> list[str]:
    """The parts of a text between commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse_seeds(text: str) -> list[int]:
    """`3` stands for 1, 2, 3; `1,7` for these two.

    Raises:
        ConfigError: not whole numbers, none, or one twice.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    seeds = list(range(1, numbers[0] + 1)) if len(numbers) == 1 and "," not in text else numbers
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: give their number, at least 1, or different seeds such as 1,2,3.")
    return seeds


def plan_grid(
    preset: str,
    axes: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    output: Path | None = None,
) -> list[PlannedRun]:
    """The runs of a study: for each seed, each point of the grid.

    Args:
        preset: name of a preset.
        axes: the settings that vary, each with its values.
        seeds: a run of each point for each.
        overrides: KEY=VALUE for all runs. A point that does not read one goes without it.
        output: folder of the runs; None: that of the settings.

    Raises:
        ConfigError: settings are wrong, no run reads one of the overrides, or runs differ in more than the axes.
    """
    points: dict[str, Point] = {}
    unread: list[dict[str, str]] = []
    for values in itertools.product(*axes.values()):
        choices = dict(zip(axes, values, strict=True))
        read, left_out = _read_by(preset, [*overrides, *(f"{key}={value}" for key, value in choices.items())])
        kept = {key: value for key, value in choices.items() if f"{key}={value}" not in left_out}
        points.setdefault(json.dumps(sorted(read)), Point(" ".join(kept.values()) or preset, kept, read))
        unread.append(left_out)
    if len(points) < 2:
        raise ConfigError("--vary: all points of this grid are the same run; nothing that varies is read.")
    return _planned(preset, list(points.values()), seeds, overrides, unread, output)


def plan_points(
    preset: str,
    points: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    output: Path | None = None,
) -> list[PlannedRun]:
    """The runs of a study whose points are named one by one; arguments and errors as of `plan_grid`."""
    planned: list[Point] = []
    unread: list[dict[str, str]] = []
    for name, settings in points.items():
        read, left_out = _read_by(preset, [*overrides, *settings])
        for item in (item for item in settings if item in left_out):
            raise ConfigError(f"--point {name}: nothing reads {item}, since {left_out[item]}. Leave it out.")
        planned.append(Point(name, {POINT: name}, read))
        unread.append(left_out)
    return _planned(preset, planned, seeds, overrides, unread, output)


def _planned(
    preset: str,
    points: Sequence[Point],
    seeds: Sequence[int],
    overrides: Sequence[str],
    unread: Sequence[Mapping[str, str]],
    output: Path | None,
) -> list[PlannedRun]:
    """The runs of different points; `unread` holds the settings that each point goes without, and why."""
    for item in overrides:
        if all(item in left_out for left_out in unread):
            raise ConfigError(f"{item}: no run of this study reads it, since {unread[0][item]}. Leave it out.")
    runs: dict[str, PlannedRun] = {}
    for seed, point in itertools.product(seeds, points):
        run = _run(preset, point, seed, output)
        other = runs.setdefault(run.key, run)
        if other is not run:
            raise ConfigError(f"{other.point.name} and {point.name} are the same run; leave one out.")
    varied = [_key_of(item) for point in points for item in point.overrides if item not in overrides]
    check_equal_terms([run.settings for run in runs.values()], varied)
    return list(runs.values())


def _read_by(preset: str, overrides: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The overrides that a run with all of them reads, and the others with the reason."""
    unread = unread_keys(Sources(Settings, preset, overrides, None).merged())
    left_out = {
        item: reason for item in overrides for name, reason in unread.items() if _is_within(_key_of(item), name)
    }
    return tuple(item for item in overrides if item not in left_out), left_out


def _is_within(key: str, name: str) -> bool:
    """Whether a key is `name`, or a key of that group."""
    return key == name or key.startswith(f"{name}.")


def _key_of(override: str) -> str:
    key = override.partition("=")[0].strip()
    return "model.architecture" if key == "model" else key


def _run(preset: str, point: Point, seed: int, output: Path | None) -> PlannedRun:
    fixed = [*point.overrides, f"run.seed={seed}"]
    if output is not None:
        fixed.append(f"run.output_dir={output}")
    key = settings_key(load_settings(preset, fixed))
    parts = (re.sub(r"[^0-9A-Za-z.]+", "-", part).strip("-.") for part in (*point.choices.values(), f"s{seed}"))
    name = "-".join(part for part in parts if part)
    return PlannedRun(point, seed, load_settings(preset, [*fixed, f"run.name={name}-{key[:KEY_LENGTH]}"]), key)


def settings_key(settings: Settings) -> str:
    """A hash of the settings without name and place, which names a finished run."""
    values = resolved(settings)
    values["run"] = {key: value for key, value in values["run"].items() if key not in ("name", "output_dir")}
    for group in ("logging", "hub"):
        del values[group]
    # Unset and unread settings are left out, so that a new setting of a later version changes no key of an old run.
    unread = unread_keys(settings.model_dump(exclude_none=True))
    kept = {
        key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for key, value in flat_settings(values).items()
        if value is not None and not any(_is_within(key, name) for name in unread)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def resolved(settings: Settings) -> dict[str, Any]:
    """All values, with the architecture's defaults where nothing is set: both mean the same run."""
    values = settings.model_dump(mode="json")
    defaults = {field.name: field.default for field in fields(RoutingFields)}
    values["model"] = {key: defaults.get(key) if value is None else value for key, value in values["model"].items()}
    return values


def check_equal_terms(runs: Sequence[Settings], varied: Sequence[str]) -> None:
    """Refuse runs that differ in a setting that both read and that is not an axis.

    Raises:
        ConfigError: names the setting and both values.
    """
    excused = (*varied, *_RUN_KEYS, "logging", "hub")
    first: dict[str, tuple[str, Any]] = {}  # by key: the first run that reads it, and its value
    for run in runs:
        unread = (*excused, *unread_keys(run.model_dump(exclude_none=True)))
        for key, value in flat_settings(resolved(run)).items():
            if any(_is_within(key, name) for name in unread):
                continue
            other, its = first.setdefault(key, (run.run.name, value))
            if value != its:
                raise ConfigError(
                    f"{key}: runs are not on equal terms, {other} has {show_value(its)} and {run.run.name} "
                    f"{show_value(value)}; make it equal, or vary it with --vary {key}=…"
                )
