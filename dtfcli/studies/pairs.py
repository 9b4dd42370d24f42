"""Which points of a study are compared with which: with the control that is like them in everything else."""

from collections.abc import Sequence

from dtfcli.errors import ConfigError
from dtfcli.studies.grid import Cell

Pair = tuple[str, str]
"""Names of a point and of its control."""


def pair_up(cells: Sequence[Cell], against: Sequence[str] = ()) -> list[Pair]:
    """Pair points with controls.

    A control is named whole ("random 0.25": all other points are compared with it), or by one value of an axis
    ("random": each point is compared with the random one that has its other values). A point that does not read an
    axis fits every value of it: dense is compared with random at each capacity.

    Args:
        cells: different points.
        against: controls; none: random, for points without one like them dense, then the first point.

    Raises:
        ConfigError: an unknown control, or a point that has none like it.
    """
    pairs: dict[frozenset[str], Pair] = {}
    for control in against or _default(cells):
        alone = {cell.name for cell in cells} - {name for pair in pairs.values() for name in pair}
        for pair in _pairs_of(control, cells):
            if against or alone & {*pair}:
                pairs.setdefault(frozenset(pair), pair)
    alone = {cell.name for cell in cells} - {name for pair in pairs.values() for name in pair}
    if alone:
        raise ConfigError(
            f"--against {' '.join(against)}: no control is like {sorted(alone)[0]} in the rest; name a point whole, "
            f"such as --against '{cells[0].name}'."
        )
    return list(pairs.values())


def _default(cells: Sequence[Cell]) -> list[str]:
    values = [value for cell in cells for value in cell.choices.values()]
    return [*(name for name in ("random", "dense") if name in values), cells[0].name]


def _pairs_of(control: str, cells: Sequence[Cell]) -> list[Pair]:
    whole = [cell for cell in cells if cell.name == control]
    if whole:
        return [(cell.name, control) for cell in cells if cell.name != control]
    axis = next((key for cell in cells for key, value in cell.choices.items() if value == control), None)
    if axis is None:
        names = [cell.name for cell in cells]
        values = [value for cell in cells for value in cell.choices.values() if value not in names]
        raise ConfigError(
            f"--against {control}: not a point of this study; choose from {', '.join(dict.fromkeys(names + values))}."
        )
    controls = [cell for cell in cells if cell.choices.get(axis) == control]
    others = [cell for cell in cells if cell.choices.get(axis) != control]
    return [(cell.name, own.name) for cell in others for own in controls if _alike(cell, own, axis)]


def _alike(cell: Cell, control: Cell, axis: str) -> bool:
    """Whether two points agree on every axis that both read, but this one."""
    common = (cell.choices.keys() & control.choices.keys()) - {axis}
    return all(cell.choices[key] == control.choices[key] for key in common)
