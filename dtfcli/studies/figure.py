"""A study as a picture: differences with their intervals, loss against cost with the dense line, learning curves."""

from pathlib import Path
from typing import Any

from dtfcli.studies.report import Row, StudyReport

_COLORS = ("#1f4e9c", "#d9822b", "#3d8c5a", "#8e5bb5", "#6a655c", "#b8433f", "#2a8fa3", "#9a7b2f")


def draw_study(report: StudyReport, path: Path) -> None:
    """Draw into a .png file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained", dpi=130)
    axes = figure.subplots(2, 2)
    figure.suptitle(report.title, x=0.01, ha="left", fontweight="bold")
    colors = {row.name: _COLORS[index % len(_COLORS)] for index, row in enumerate(report.rows)}
    _differences(axes[0][0], report, colors)
    _curves(axes[0][1], report, colors)
    _pareto(axes[1][0], report, colors, "FLOPs of a forward pass / dense", lambda row: row.flop_ratio)
    _pareto(axes[1][1], report, colors, "measured time of a decoded token / dense", _decode_time)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _decode_time(row: Row) -> float | None:
    return None if row.timing is None else row.timing.decode


def _differences(axis: Any, report: StudyReport, colors: dict[str, str]) -> None:
    for place, difference in enumerate(reversed(report.differences)):
        color = colors[difference.name]
        low, high = difference.by_document
        axis.plot([low, high], [place - 0.12] * 2, color=color, linewidth=5, alpha=0.45, solid_capstyle="butt")
        if difference.by_seed is not None:
            axis.plot(list(difference.by_seed), [place + 0.12] * 2, color=color, linewidth=1.5)
        axis.plot([difference.value], [place], "o", color=color)
    axis.set_yticks(range(len(report.differences)), [d.name for d in reversed(report.differences)])
    axis.axvline(0.0, color="#1d1b18", linewidth=1)
    control = report.differences[0].control
    axis.set_xlabel(f"val/loss − that of {control}, nats; band: 95 % by document, line: by seed")


def _curves(axis: Any, report: StudyReport, colors: dict[str, str]) -> None:
    for name, curves in report.curves.items():
        for number, curve in enumerate(curves):
            axis.plot(*zip(*curve, strict=True), color=colors[name], linewidth=1.2, label=name if number == 0 else None)
    axis.set_xlabel("updates")
    axis.set_ylabel("causal val/loss, nats")
    axis.legend(fontsize=8)


def _pareto(axis: Any, report: StudyReport, colors: dict[str, str], label: str, cost: Any) -> None:
    for row in report.rows:
        value = 1.0 if row.routed_share is None else cost(row)
        if value is None:
            continue
        axis.errorbar([value], [row.loss], yerr=row.sd, fmt="o", color=colors[row.name], capsize=3)
        axis.annotate(row.name, (value, row.loss), xytext=(5, 5), textcoords="offset points", fontsize=8)
        if row.routed_share is None:
            axis.axhline(row.loss, color=colors[row.name], linewidth=1, linestyle=":")
    axis.set_xlabel(label)
    axis.set_ylabel("causal val/loss, nats")
