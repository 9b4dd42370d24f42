"""A study as a picture: differences, learning curves, loss and accuracy against cost, what routers did.

A color is an architecture (or the first axis's value), a line style or a marker the rest of a point's name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtfcli.studies.measure import Curve
from dtfcli.studies.report import Row, StudyReport

_COLORS = ("#1f4e9c", "#d9822b", "#3d8c5a", "#8e5bb5", "#6a655c", "#b8433f", "#2a8fa3", "#9a7b2f")
_LINES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
_INK = "#1d1b18"


@dataclass(frozen=True)
class _Look:
    """How a point is drawn."""

    family: str
    color: str
    line: str
    marker: str


def _looks(names: Iterable[str]) -> dict[str, _Look]:
    families: dict[str, str] = {}
    rests: dict[str, int] = {}
    looks = {}
    for name in names:
        family, _, rest = name.partition(" ")
        color = families.setdefault(family, _COLORS[len(families) % len(_COLORS)])
        place = rests.setdefault(rest, len(rests)) if rest else 0
        looks[name] = _Look(family, color, _LINES[place % len(_LINES)], _MARKERS[place % len(_MARKERS)])
    return looks


def draw_study(report: StudyReport, path: Path) -> None:
    """Draw into a .png file."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # names are no formulas
        _draw(report, path)


def _draw(report: StudyReport, path: Path) -> None:
    from matplotlib.figure import Figure

    looks = _looks(row.name for row in report.rows)
    figure = Figure(figsize=(12, 17), layout="constrained", dpi=110)
    axes = figure.subplots(4, 2)
    figure.suptitle(report.title, x=0.01, ha="left", fontweight="bold", fontsize=10, wrap=True)
    _differences(axes[0][0], report, looks)
    _curves(axes[0][1], report.curves, looks, "causal val/loss, nats")
    costs = (
        ("FLOPs of a forward pass / dense", lambda row: row.flop_ratio),
        ("measured time of a decoded token / dense", lambda row: row.timing and row.timing.decode),
    )
    for column, (label, cost) in enumerate(costs):
        _pareto(axes[1][column], report.rows, looks, label, cost)
        _pareto(axes[2][column], report.rows, looks, label, cost, accuracy=True)
    _curves(axes[3][0], report.share_curves, looks, "routed share, held-out text", report.spread_curves)
    _agreement(axes[3][1], report)
    for axis in axes.flat[:-1]:
        axis.grid(alpha=0.25)
        axis.spines[["top"]].set_visible(False)
    figure.savefig(path, format="png")


def _differences(axis: Any, report: StudyReport, looks: Mapping[str, _Look]) -> None:
    for place, difference in enumerate(reversed(report.differences)):
        look = looks[difference.name]
        low, high = difference.by_document
        axis.plot([low, high], [place - 0.12] * 2, color=look.color, linewidth=5, alpha=0.45, solid_capstyle="butt")
        if difference.by_seed is not None:
            axis.plot(list(difference.by_seed), [place + 0.12] * 2, color=look.color, linewidth=1.5)
        axis.plot([difference.value], [place], look.marker, color=look.color)
    axis.set_yticks(range(len(report.differences)), [d.title for d in reversed(report.differences)], fontsize=8)
    axis.axvline(0.0, color=_INK, linewidth=1)
    axis.set_xlabel("difference in val/loss, nats (left: better)\nband: 95 % by document, line: 95 % by seed")


def _curves(
    axis: Any,
    curves: Mapping[str, list[Curve]],
    looks: Mapping[str, _Look],
    label: str,
    second: Mapping[str, list[Curve]] | None = None,
) -> None:
    """One line for each run; a second set of curves gets the axis on the right and thin lines."""
    right = axis.twinx() if second and any(any(own) for own in second.values()) else None
    for where, drawn, width in ((axis, curves, 1.3), *([(right, second or {}, 0.5)] if right is not None else [])):
        for name, own in drawn.items():
            look = looks[name]
            for number, curve in enumerate(own):
                if curve:
                    text = name if number == 0 and where is axis else None
                    where.plot(*zip(*curve, strict=True), look.line, color=look.color, linewidth=width, label=text)
    axis.set_xlabel("updates")
    axis.set_ylabel(label)
    if right is not None:
        right.set_ylabel("thin: sd of a router's scores")
        right.set_yscale("log")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, ncols=2)


def _pareto(
    axis: Any,
    rows: list[Row],
    looks: Mapping[str, _Look],
    label: str,
    cost: Callable[[Row], float | None],
    accuracy: bool = False,
) -> None:
    """Loss (or accuracy) against a cost; points of one architecture are joined, the dense model's value is a line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        look, dense = looks[row.name], row.routed_share is None
        value, sd = (row.accuracy, row.accuracy_sd) if accuracy else (row.loss, row.sd)
        if dense:
            axis.axhline(value, color=look.color, linewidth=1, linestyle=":")
        paid = 1.0 if dense else cost(row)
        if paid is None:
            continue
        lines.setdefault(look.family, []).append((paid, value))
        axis.errorbar([paid], [value], yerr=sd, fmt=look.marker, color=look.color, capsize=3)
        axis.annotate(row.name, (paid, value), xytext=(5, 4), textcoords="offset points", fontsize=7)
    for family, points in lines.items():
        color = next(look.color for look in looks.values() if look.family == family)
        axis.plot(*zip(*sorted(points), strict=True), color=color, linewidth=0.8, alpha=0.6)
    axis.set_xlabel(label)
    axis.set_ylabel("next-token accuracy, held-out text" if accuracy else "causal val/loss, nats")


def _agreement(axis: Any, report: StudyReport) -> None:
    """κ of any two points as colored squares with their numbers."""
    heads, rows = report.agreement_table()
    axis.set_title("agreement of routed tokens, Cohen's κ", fontsize=9)
    if not rows:
        axis.set_axis_off()
        return
    numbers = [[float(cell) if cell else float("nan") for cell in row[1:]] for row in rows]
    axis.imshow(numbers, cmap="BrBG", vmin=-1, vmax=1)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row[1:]):
            axis.text(x, y, cell, ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(rows)), heads[1:], rotation=45, ha="right", fontsize=7)
    axis.set_yticks(range(len(rows)), heads[1:], fontsize=7)
