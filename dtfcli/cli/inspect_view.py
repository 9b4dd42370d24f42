"""The terminal output of `dtf inspect-routing`: colored text, heat map, tables."""

from bisect import bisect_left
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from dtfcli.cli import render

if TYPE_CHECKING:
    from rich.text import Text

    from dtfcli.inspection.corpus import CorpusRouting
    from dtfcli.inspection.sensitivity import Sensitivity
    from dtfcli.inspection.statistics import Summary
    from dtfcli.inspection.tables import TableData
    from dtfcli.inspection.text import TextRouting

TOKENS_SHOWN = 600
"""Of a longer text the terminal shows the beginning; page, picture and JSON have all."""
_HEAT_SHOWN = 320
_EXTREMES = 8
_STOPS = ("#6e6e78", "#3c5ac8", "#a032aa", "#e15a14")
"""From no routed layer to all of them; readable on dark and on light terminals."""


def show(report: "TextRouting | CorpusRouting", summary: "Summary") -> None:
    """Print the key figures, of a text each token, and the tables."""
    from dtfcli.inspection.text import TextRouting

    _headline(report, summary)
    if isinstance(report, TextRouting):
        _show_tokens(report)
    _show_tables(report, summary)


def _show_tokens(report: "TextRouting") -> None:
    """Print a text colored by depth, its heat map, and the tokens with the most and the least depth."""
    from rich.text import Text

    layers = len(report.layers)
    if render.out.color_system is not None:  # without color the heat map alone says all
        legend = Text("depth, the number of layers that routed a token:  ", "dim")
        for depth in range(layers + 1) if layers <= 12 else range(0, layers + 1, -(-layers // 8)):
            legend.append(f" {depth} ", f"not dim {_style(depth, layers)}")
        render.out.print(legend, Text(), sep="\n")
    render.out.print(colored(report, stop=TOKENS_SHOWN))
    _left_out(len(report.source), TOKENS_SHOWN)
    render.out.print(_heat_map(report, render.out.width))
    _left_out(len(report.source), _HEAT_SHOWN)
    render.out.print(_extremes(report, render.out.width))


def show_sensitivity(sensitivity: "Sensitivity") -> None:
    """Print the cost of each layer, and the order of the routed ones."""
    from rich.text import Text

    from dtfcli.inspection.tables import sensitivity_table

    targets = sensitivity.losses[None].targets
    texts = "1 text" if len(targets) == 1 else f"{len(targets):,} texts"
    counts = f"{texts}, {int(targets.sum()):,} tokens"
    render.out.print(Text(f"{counts}, loss {sensitivity.loss:.3f} nats with all layers", "dim"))
    _show_table(sensitivity_table(sensitivity))
    order = ",".join(map(str, sensitivity.order))
    render.out.print(f"\nrouted layers, the costliest first: model.layer_order=[{order}]", markup=False)


def _headline(report: "TextRouting | CorpusRouting", summary: "Summary") -> None:
    from rich.text import Text

    from dtfcli.inspection.tables import key_figures

    causal = "causal" if report.causal else "NOT causal: every choice sees the whole text"
    title = Text(f"{report.name}, {report.gamma}, routing {report.routing} ({causal})", "bold")
    windows = f" in {summary.windows} windows" if summary.windows > summary.texts else ""
    render.out.print(title, Text(f"{report.reading.rule}{windows and f' The text is cut{windows}.'}", "dim"), sep="\n")
    figures = render.table(["", "", ""], map(astuple, key_figures(report, summary)))
    figures.show_header = False
    render.out.print(Text(), figures, Text(), sep="\n")


def colored(report: "TextRouting", first: int = 0, stop: int | None = None) -> "Text":
    """The text of the tokens from `first` to before `stop`, each on the color of its depth."""
    from rich.text import Text

    from dtfcli.inspection.tokens import visible

    painted = Text()
    layers, source, depths = len(report.layers), report.source, report.depth
    for t in range(first, min(len(source), len(source) if stop is None else stop)):
        style = _style(depths[t], layers)
        if t in report.windows[1:]:
            painted.append("\n⋯ a new window ⋯\n", "dim")
        painted.append(visible(source.gaps[t]))
        piece = source.pieces[t] or "·"
        for i, line in enumerate(visible(piece).split("\n")):
            if i:
                painted.append("⏎", style)
                painted.append("\n")
            painted.append(line.replace("\t", "    "), style)
    return painted


def _style(depth: float, layers: int) -> str:
    from dtfcli.inspection.palette import blend

    return f"white on {blend(_STOPS, depth / max(1, layers))}"


def _left_out(tokens: int, shown: int) -> None:
    if tokens > shown:
        note = f"… {tokens - shown:,} more tokens; --html and --output have all."
        render.out.print(note, style="dim", markup=False)


def _heat_map(report: "TextRouting", width: int) -> "Text":
    """Layers × tokens, wrapped: · a token that skipped, ▒▓█ a routed one, by the rank of its score."""
    from rich.text import Text

    shown, columns = min(len(report.source), _HEAT_SHOWN), max(10, width - 10)
    heat = Text("\n")
    for start in range(0, shown, columns):
        stop = min(start + columns, shown)
        heat.append(f"tokens {start} to {stop - 1}\n", "dim")
        for layer in reversed(report.layers):
            heat.append(f"layer {layer.layer:<3} ", "dim")
            scores = sorted(layer.score[layer.selected])
            for selected, score in zip(layer.selected[start:stop], layer.score[start:stop], strict=True):
                third = min(2, 3 * bisect_left(scores, score) // max(1, len(scores)))
                heat.append(*(("▒▓█"[third], "rgb(225,90,20)") if selected else ("·", "rgb(110,110,120)")))
            heat.append("\n")
    name = report.reading.labels.get("predicted_cost", "score")
    skipping = "took the forecast" if report.bypass == "forecast" else "passed by"
    heat.append(f"· {skipping}  ▒▓█ routed, low to high {name}\n", "dim")
    return heat


def _extremes(report: "TextRouting", width: int) -> "Text":
    """The tokens, by their text, with the most and the least depth on average; in a tie the most frequent first."""
    from rich.text import Text

    from dtfcli.inspection.tokens import short

    depths: dict[str, list[int]] = {}
    for t, piece in enumerate(report.source.pieces):
        if not report.sinks[t]:
            depths.setdefault(short(piece), []).append(report.depth[t])
    means = [(sum(group) / len(group), len(group), piece) for piece, group in depths.items()]
    lines = Text("\n")
    for title, sign in (("most routed ", -1), ("least routed", 1)):
        line = Text(title + "  ", "bold")
        for mean, count, piece in sorted(means, key=lambda row: (sign * row[0], -row[1]))[:_EXTREMES]:
            entry = Text(f" {piece} ", _style(mean, len(report.layers)))
            entry.append(f" {mean:.3g}" + (f" ({count}×)" if count > 1 else "") + "  ", "not bold dim")
            if line.cell_len + entry.cell_len <= width:
                line.append(entry)
        lines.append(line).append("\n")
    legend = "number: routed layers that computed the token, on average (times that it occurs); "
    return lines.append(legend + "· before a word is a space", "dim")


def _show_tables(report: "TextRouting | CorpusRouting", summary: "Summary") -> None:
    from dtfcli.inspection.tables import all_tables

    for data in all_tables(report, summary):
        _show_table(data)


def _show_table(data: "TableData") -> None:
    from rich.text import Text

    rows = [[_cell(kind, value) for (_, kind), value in zip(data.columns, row, strict=True)] for row in data.rows]
    title = Text(f"\n{data.title}", "bold").append(f"\n{data.note}", "not bold dim")
    render.out.print(title)
    render.show_table([name for name, _ in data.columns], rows)


def _cell(kind: str, value: Any) -> str:
    value, error = value if isinstance(value, list) else (value, None)
    if value is None:
        return "–"
    if kind in ("text", "count"):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if kind == "share":
        return f"{round(value, 2) + 0.0:.0%}" if error is None else f"{value:.1%} ±{100 * error:.1f}"
    shown = f"{value:+.3f}" if kind == "difference" else _figure(value)
    return shown if error is None else f"{shown} ±{_figure(error)}"


def _figure(value: float) -> str:
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"
