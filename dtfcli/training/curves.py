"""curves.png: losses, routed shares and speed of a run."""

from pathlib import Path
from typing import Any

from dtfcli.runs.files import explained_write_errors, replaced_file

Line = dict[str, Any]
_TRAIN, _VALIDATION, _TOPK, _GRAY = "#9db4d8", "#1f4e9c", "#d9822b", "#8a8a8a"


def draw_curves(lines: list[Line], path: Path, title: str) -> None:
    """Draw losses, routed shares and speed from the lines of metrics.jsonl.

    Args:
        lines: training steps and evaluations, in order.
        path: of the picture.
        title: the run's name.
    """
    from matplotlib.figure import Figure

    routed = any(name.startswith("router/") for line in lines for name in line)
    rows = 3 if routed else 2
    figure = Figure(figsize=(8, 2.6 * rows + 0.8), layout="constrained", dpi=130)
    axes = figure.subplots(rows, 1, sharex=True, height_ratios=[2] + [1] * (rows - 1))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    _draw_losses(axes[0], lines)
    if routed:
        _draw_shares(axes[1], lines)
    axes[-1].plot(*_series(lines, "tokens_per_second"), color=_VALIDATION, linewidth=1)
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_ylabel("tokens / s")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("steps")
    with explained_write_errors(path.parent), replaced_file(path) as partial:
        figure.savefig(partial, format="png")


def _series(lines: list[Line], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw_losses(axis: Any, lines: list[Line]) -> None:
    axis.plot(*_series(lines, "train/loss"), color=_TRAIN, linewidth=1, label="train")
    steps, losses = _series(lines, "val/loss_topk")
    if steps:
        axis.plot(steps, losses, color=_TOPK, linestyle=":", marker=".", label="validation, top-k (not causal)")
    steps, losses = _series(lines, "val/loss")
    if steps:
        axis.plot(steps, losses, color=_VALIDATION, linewidth=2, marker="o", markersize=4, label="validation")
        place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "right"}
        axis.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), color=_VALIDATION, fontweight="bold", **place)
    for value in _series(lines, "val/unigram")[1][:1]:
        axis.axhline(value, color=_GRAY, linestyle="--", linewidth=1, label="unigram")
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False, fontsize="small")


def _draw_shares(axis: Any, lines: list[Line]) -> None:
    """The causal share of each routed layer, at evaluations. Training lines hold top-k's share, which is fixed."""
    import matplotlib

    evaluations = [line for line in lines if "val/loss" in line]
    known = {name for line in lines for name in line}
    names = sorted((n for n in known if n.startswith("router/") and n.endswith("/routed_share")), key=_layer)
    colors = matplotlib.colormaps["viridis"]
    for place, name in enumerate(names):
        color = colors(place / max(1, len(names)))
        axis.plot(*_series(evaluations, name), color=color, marker=".", label=f"layer {_layer(name)}")
    axis.set_ylim(0, 1)
    axis.set_ylabel("routed share")
    if len(names) <= 8:
        axis.legend(frameon=False, fontsize="x-small", ncols=4)


def _layer(name: str) -> int:
    return int(name.split("/")[1])
