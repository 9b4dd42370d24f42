"""A report as a picture: the text colored by depth, layers × tokens, shares by layer and token class."""

import io
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dtfcli.inspection.corpus import CorpusRouting
from dtfcli.inspection.palette import SEQUENTIAL, blend, readable_on
from dtfcli.inspection.statistics import Summary
from dtfcli.inspection.tables import key_figures
from dtfcli.inspection.text import TextRouting
from dtfcli.inspection.tokens import visible

_WIDTH = 12.0
_MARGIN = 0.55
_LINE = 0.235
_COLUMNS = 132
_LINES_SHOWN = 44
_INK, _SOFT, _PAPER = "#1d1b18", "#6a655c", "#fbfaf7"
_STOPS = SEQUENTIAL[0]
_ACCENT = blend(_STOPS, 0.62)
_RAMP = LinearSegmentedColormap.from_list("depth", list(_STOPS))
_SMALL: dict[str, Any] = {"fontsize": 7.5, "color": _SOFT, "va": "center"}
_TITLE: dict[str, Any] = {"fontsize": 9.5, "color": _INK, "weight": "bold", "loc": "left"}
_MONO: dict[str, Any] = {
    "family": "monospace",
    "fontsize": 9.3,
    "parse_math": False,
    "ha": "center",
    "va": "center_baseline",
}


def draw_figure(report: TextRouting | CorpusRouting, summary: Summary, path: Path) -> None:
    """Draw a report into a .png file; of a long text the beginning, and it says so."""
    lines, shown = _wrap(report) if isinstance(report, TextRouting) else ([], 0)
    groups_height = 0.3 * len(summary.groups.get("class", [])) + 0.15
    text_height = _LINE * len(lines)
    map_height = 0.0 if not lines else max(0.9, min(2.6, 0.2 * len(summary.layers)))
    layers_height = 0.3 * len(summary.layers) + 0.15
    bars_height = max(layers_height, groups_height)
    head = 1.25 if lines else 1.6  # a chart has its title above it
    gaps = head + (0.75 if lines else 0.0) + (0.95 if lines else 0.0) + 0.9
    height = text_height + map_height + bars_height + gaps
    figure = Figure(figsize=(_WIDTH, height), facecolor=_PAPER)
    FigureCanvasAgg(figure)

    def place(left: float, top: float, width: float, tall: float) -> Axes:
        return figure.add_axes((left / _WIDTH, 1 - (top + tall) / height, width / _WIDTH, tall / height))

    inner = _WIDTH - 2 * _MARGIN
    _headline(figure, report, summary, height)
    top = head
    if isinstance(report, TextRouting):
        _draw_text(place(_MARGIN, top, inner, text_height), report, lines)
        top += text_height + 0.2
        _draw_legend(place(_MARGIN, top, 2.6, 0.17), len(report.layers))
        if shown < len(report.source):
            note = f"the first {shown:,} of {len(report.source):,} tokens; the map below has all"
            figure.text(1 - _MARGIN / _WIDTH, 1 - (top + 0.1) / height, note, ha="right", **_SMALL)
        top += 0.6
        _draw_map(place(_MARGIN + 0.35, top, inner - 0.35, map_height), report)
        top += map_height + 0.9
    half = inner / 2 - 0.5
    _draw_layers(place(_MARGIN + 0.35, top, half - 0.35, layers_height), report, summary)
    _draw_groups(place(_MARGIN + half + 2.2, top, half - 1.2, groups_height), summary)
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=150)
    # A palette holds all colors of the picture, in a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(256).save(path, format="png", optimize=True)


def _headline(figure: Figure, report: TextRouting | CorpusRouting, summary: Summary, height: float) -> None:
    left = _MARGIN / _WIDTH
    name = visible(report.model or report.architecture)
    figure.text(left, 1 - 0.42 / height, name, fontsize=15, weight="bold", color=_INK, va="center", parse_math=False)
    causal = "causal" if report.causal else "NOT causal"
    facts = [f"{report.name}, {report.gamma}, {report.routing} ({causal})"]
    facts += [f"{figure.name} {figure.value}" for figure in key_figures(report, summary)]
    for line, text in enumerate((report.reading.rule, "  ·  ".join(facts))):
        place = 1 - (0.71 + 0.21 * line) / height
        figure.text(left, place, text, fontsize=8.5, color=_SOFT, va="center", parse_math=False)


def _wrap(report: TextRouting) -> tuple[list[list[tuple[int, str]]], int]:
    """Lines of (token, text) pieces, no wider than the figure; and how many tokens they hold. Token −1: a gap."""
    lines: list[list[tuple[int, str]]] = [[]]
    column = 0
    for t, (gap, piece) in enumerate(zip(report.source.gaps, report.source.pieces, strict=True)):
        for token, content in ((-1, gap), (t, piece or "·")):
            for i, part in enumerate(visible(content).expandtabs(4).split("\n")):
                if i:
                    if lines[-1] or (len(lines) > 1 and lines[-2]):  # one empty line stands for many
                        lines.append([])
                    column = 0
                for start in range(0, len(part), _COLUMNS):
                    stretch = part[start : start + _COLUMNS]
                    if column + _columns(stretch) > _COLUMNS:
                        lines.append([])
                        column = 0
                        stretch = stretch.lstrip(" ") or stretch
                    lines[-1].append((token, stretch))
                    column += _columns(stretch)
            if len(lines) > _LINES_SHOWN:
                return lines[:_LINES_SHOWN], t
    return lines, len(report.source)


def _columns(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _draw_text(axes: Axes, report: TextRouting, lines: list[list[tuple[int, str]]]) -> None:
    axes.set(xlim=(0, _COLUMNS), ylim=(len(lines), 0))
    axes.axis("off")
    depth = report.depth_share
    for y, line in enumerate(lines):
        x = 0
        for token, content in line:
            color = _INK
            if token >= 0:
                shade = blend(_STOPS, depth[token])
                color, wide = readable_on(shade), _columns(content) - 0.08
                axes.add_patch(Rectangle((x + 0.04, y + 0.05), wide, 0.9, facecolor=shade, edgecolor="none"))
            # Character by character: a font's advance is not a whole number of pixels, and errors would add up.
            for c in content:
                if c != " ":
                    axes.text(x + max(1, _columns(c)) / 2, y + 0.54, c, color=color, **_MONO)
                x += _columns(c)


def _draw_legend(axes: Axes, layers: int) -> None:
    axes.imshow(np.linspace(0, 1, layers + 1)[None, :], cmap=_RAMP, aspect="auto", vmin=0, vmax=1)
    axes.set_yticks([])
    axes.set_xticks(sorted({0, layers // 2, layers} if layers > 8 else set(range(layers + 1))))
    axes.tick_params(length=0, labelsize=7.5, colors=_SOFT, pad=2)
    axes.set_frame_on(False)
    axes.text(1.03, 0.5, "depth: routed layers that took the token", transform=axes.transAxes, **_SMALL)


def _draw_map(axes: Axes, report: TextRouting) -> None:
    """Layers × tokens; with more tokens than pixels each column is the share of several."""
    selected = report.selected.astype(float)
    columns = min(selected.shape[1], 1500)
    edges = np.linspace(0, selected.shape[1], columns + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, selected.shape[1]))
    means = np.add.reduceat(selected, edges, axis=1) / counts
    extent = (0, selected.shape[1], -0.5, len(report.layers) - 0.5)
    axes.imshow(means[::-1], cmap=_RAMP, aspect="auto", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    every = max(1, len(report.layers) // 8)
    axes.set_yticks(range(0, len(report.layers), every), [str(layer.layer) for layer in report.layers][::every])
    for start in report.windows[1:]:
        axes.axvline(start, color=_PAPER, linewidth=1.2)
    _quiet(axes)
    axes.set_ylabel("layer", color=_SOFT, fontsize=8.5)
    axes.set_xlabel("token", color=_SOFT, fontsize=8.5)


def _draw_layers(axes: Axes, report: TextRouting | CorpusRouting, summary: Summary) -> None:
    places = np.arange(len(summary.layers))
    shares = [layer.routed_share for layer in summary.layers]
    axes.barh(places, shares, color=blend(_STOPS, 0.42), height=0.72)
    capacities = report.capacity if isinstance(report.capacity, (list, tuple)) else [report.capacity] * len(places)
    for y, (share, capacity) in enumerate(zip(shares, capacities, strict=True)):
        axes.plot([capacity, capacity], [y - 0.42, y + 0.42], color=_INK, linewidth=1.3, label="γ" if y == 0 else None)
        axes.text(1.08, y, f"{share:.0%}", ha="right", **_SMALL)
    axes.set_yticks(places, [str(layer.layer) for layer in summary.layers])
    axes.set_ylim(-0.6, len(places) - 0.4)
    axes.set_title("Routed share by layer; the line is γ", **_TITLE)
    _quiet(axes, shares=True)


def _draw_groups(axes: Axes, summary: Summary) -> None:
    """Routed share of each token class, with two standard errors."""
    rows = summary.groups.get("class", [])
    at_the_right = _SMALL | {"ha": "right", "transform": axes.get_yaxis_transform()}  # x as a share of the axes
    for y, row in enumerate(rows):
        axes.barh(y, row.routed_share, color=blend(_STOPS, 0.42), height=0.72)
        error = 2 * (row.routed_error or 0.0)
        axes.plot([row.routed_share - error, row.routed_share + error], [y, y], color=_INK, linewidth=1)
        axes.text(1.0, y, f"{row.tokens:,}", **at_the_right)
    axes.axvline(summary.routed_share, color=_ACCENT, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title("Routed share by kind of token, ±2 s.e.; tokens at the right", x=-0.28, **_TITLE)
    _quiet(axes, shares=True)


def _quiet(axes: Axes, shares: bool = False) -> None:
    """Axes without a frame; with `shares` along x."""
    if shares:
        axes.set_xlim(0, 1.08)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_facecolor(_PAPER)
    axes.tick_params(length=0, labelsize=8, colors=_SOFT)
    axes.set_axisbelow(True)
