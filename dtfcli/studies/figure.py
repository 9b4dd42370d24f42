"""A study as a picture: differences, learning curves, loss against cost, what routers did.

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
class Style:
    """How a point is drawn."""

    family: str
    color: str
    line: str
    marker: str


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """Colors by the first word of each name, lines and markers by the rest."""
    families: dict[str, str] = {}
    rests: dict[str, int] = {}
    styles = {}
    for name in names:
        family, _, rest = name.partition(" ")
        color = families.setdefault(family, _COLORS[len(families) % len(_COLORS)])
        place = rests.setdefault(rest, len(rests)) if rest else 0
        styles[name] = Style(family, color, _LINES[place % len(_LINES)], _MARKERS[place % len(_MARKERS)])
    return styles


def draw_study(report: StudyReport, path: Path) -> None:
    """Draw into a .png file."""
    from matplotlib.figure import Figure

    styles = styles_of(row.name for row in report.rows)
    first = 1.2 + 0.28 * len(report.differences)
    figure = Figure(figsize=(12, first + 9), layout="constrained", dpi=100)
    places: list[Any] = [["differences"] * 2, ["flops", "time"], ["curves", "routers"]]
    axes = figure.subplot_mosaic(places, height_ratios=[first, 4.5, 4.5])
    figure.suptitle(_plain(report.title), x=0.01, ha="left", fontweight="bold", fontsize=10, wrap=True)
    _differences(axes["differences"], report, styles)
    draw_pareto(axes["flops"], report.rows, styles, "FLOPs of a forward pass / dense", lambda row: row.flop_ratio)
    decoding = "measured time of a decoded token / dense"
    draw_pareto(axes["time"], report.rows, styles, decoding, lambda row: row.timing.decode if row.timing else None)
    axes["flops"].legend(fontsize=8)
    _curves(axes["curves"], report.curves, styles, "causal val/loss, nats")
    _curves(axes["routers"], report.share_curves, styles, "routed share, held-out text")
    for axis in axes.values():
        axis.grid(alpha=0.25)
        axis.spines[["top"]].set_visible(False)
    figure.savefig(path, format="png")


def _plain(name: str) -> str:
    """A name is no formula."""
    return name.replace("$", r"\$")


def _differences(axis: Any, report: StudyReport, styles: Mapping[str, Style]) -> None:
    for place, difference in enumerate(reversed(report.differences)):
        style = styles[difference.name]
        low, high = difference.by_document
        axis.plot([low, high], [place - 0.12] * 2, color=style.color, linewidth=5, alpha=0.45, solid_capstyle="butt")
        if difference.by_seed is not None:
            axis.plot(list(difference.by_seed), [place + 0.12] * 2, color=style.color, linewidth=1.5)
        axis.plot([difference.value], [place], style.marker, color=style.color)
    axis.set_yticks(range(len(report.differences)), [_plain(d.title) for d in reversed(report.differences)], fontsize=8)
    axis.axvline(0.0, color=_INK, linewidth=1)
    axis.set_xlabel("difference in val/loss, nats (left: better)\nband: 95 % by document, line: 95 % by seed")


def _curves(axis: Any, curves: Mapping[str, list[Curve]], styles: Mapping[str, Style], label: str) -> None:
    """One line for each run."""
    for name, runs in curves.items():
        style = styles[name]
        for number, curve in enumerate(runs):
            if curve:
                text = _plain(name) if number == 0 else None
                axis.plot(*zip(*curve, strict=True), style.line, color=style.color, linewidth=1.3, label=text)
    axis.set_xlabel("updates")
    axis.set_ylabel(label)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, ncols=2)


def draw_pareto(
    axis: Any,
    rows: list[Row],
    styles: Mapping[str, Style],
    label: str,
    cost: Callable[[Row], float | None],
) -> None:
    """Loss against a cost; points of one architecture are joined, the dense model's value is a line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        style, dense = styles[row.name], row.routed_share is None
        if dense:
            axis.axhline(row.loss, color=style.color, linewidth=1, linestyle=":")
        paid = 1.0 if dense else cost(row)
        if paid is None:
            continue
        lines.setdefault(style.family, []).append((paid, row.loss))
        axis.errorbar(
            [paid], [row.loss], row.sd, fmt=style.marker, color=style.color, capsize=3, label=_plain(row.name)
        )
    for family, points in lines.items():
        color = next(style.color for style in styles.values() if style.family == family)
        axis.plot(*zip(*sorted(points), strict=True), color=color, linewidth=0.8, alpha=0.6)
    axis.set_xlabel(label)
    axis.set_ylabel("causal val/loss, nats")
