"""Which points of a study are compared with which: with the control that is like them in everything else."""

from collections.abc import Sequence

from dtfcli.errors import ConfigError
from dtfcli.studies.grid import Point

Pair = tuple[str, str]
"""Names of a point and of its control."""


def pair_up(points: Sequence[Point], against: Sequence[str] = ()) -> list[Pair]:
    """Pair points with controls.

    A control is named whole ("random 0.25": all other points are compared with it), or by one value of an axis
    ("random": each point is compared with the random one that has its other values). A point that does not read an
    axis fits every value of it: dense is compared with random at each capacity.

    Args:
        points: different points.
        against: controls; none: random, for points without one like them dense, then the first point.

    Raises:
        ConfigError: an unknown control, or a point that has none like it.
    """
    pairs: dict[frozenset[str], Pair] = {}
    for control in against or _default(points):
        alone = {point.name for point in points} - {name for pair in pairs.values() for name in pair}
        for pair in _pairs_of(control, points):
            if against or alone & {*pair}:
                pairs.setdefault(frozenset(pair), pair)
    alone = {point.name for point in points} - {name for pair in pairs.values() for name in pair}
    if alone:
        raise ConfigError(
            f"--against {' '.join(against)}: no control is like {sorted(alone)[0]} in the rest; name a point whole, "
            f"such as --against '{points[0].name}'."
        )
    return list(pairs.values())


def _default(points: Sequence[Point]) -> list[str]:
    values = [value for point in points for value in point.choices.values()]
    return [*(name for name in ("random", "dense") if name in values), points[0].name]


def _pairs_of(control: str, points: Sequence[Point]) -> list[Pair]:
    whole = [point for point in points if point.name == control]
    if whole:
        return [(point.name, control) for point in points if point.name != control]
    axis = next((key for point in points for key, value in point.choices.items() if value == control), None)
    if axis is None:
        names = [point.name for point in points]
        values = [value for point in points for value in point.choices.values() if value not in names]
        raise ConfigError(
            f"--against {control}: not a point of this study; choose from {', '.join(dict.fromkeys(names + values))}."
        )
    controls = [point for point in points if point.choices.get(axis) == control]
    others = [point for point in points if point.choices.get(axis) != control]
    return [(point.name, like.name) for point in others for like in controls if _alike(point, like, axis)]


def _alike(point: Point, control: Point, axis: str) -> bool:
    """Whether two points agree on every axis that both read, but this one."""
    return all(control.choices.get(key, value) == value for key, value in point.choices.items() if key != axis)
