"""What `dtf inspect-routing` prints: colored text, heat map, tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def show_text(report: "TextRouting", summary: "Summary") -> None:
    """Print a text colored by depth, its heat map, the tokens at both ends, and the tables."""
    from rich.text import Text

    _headline(report, summary)
    layers = len(report.layers)
    legend = Text("depth  ")
    for depth in range(layers + 1) if layers <= 12 else range(0, layers + 1, -(-layers // 8)):
        legend.append(f" {depth} ", _style(depth, layers))
    render.out.print(legend, Text(), colored(report, stop=TOKENS_SHOWN), sep="\n")
    _left_out(len(report.source), TOKENS_SHOWN)
    render.out.print(_heat_map(report, render.out.width))
    _left_out(len(report.source), _HEAT_SHOWN)
    render.out.print(_extremes(report))
    _show_tables(summary)


def show_corpus(report: "CorpusRouting") -> None:
    """Print what was added up over a corpus."""
    _headline(report, report.summary)
    _show_tables(report.summary)


def show_sensitivity(found: "Sensitivity") -> None:
    """Print what each layer costs to leave out, and the order of the routed ones."""
    from rich.text import Text

    from dtfcli.inspection.tables import sensitivity_table

    data, targets = sensitivity_table(found), found.losses[None].targets
    texts, tokens = len(targets), int(targets.sum())
    render.out.print(
        Text(f"{texts:,} texts, {tokens:,} tokens, loss {found.loss:.3f} nats with all layers", "dim"),
        Text(f"\n{data.title}  ", "bold").append(data.note, "not bold dim"),
        _table(data),
        sep="\n",
    )
    order = ",".join(map(str, found.order))
    render.out.print(f"\nrouted layers, the costliest first: model.layer_order=[{order}]", markup=False)


@contextmanager
def progress(limit: int | None) -> Iterator[Callable[[int, float | None], None]]:
    """A bar on stderr, where that is a terminal; yields what to call with documents done and the share read."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("Routing"),
        BarColumn(),
        TextColumn("{task.fields[documents]} documents"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=render.err, disable=not render.err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=1.0, documents=0)

        def on_document(done: int, share: float | None) -> None:
            bar.update(task, completed=done / limit if limit else share or 0.0, documents=done)

        yield on_document


def _headline(report: "TextRouting | CorpusRouting", summary: "Summary") -> None:
    from rich.text import Text

    causal = "causal" if report.causal else "NOT causal: every choice sees the whole text"
    capacity = report.capacity if isinstance(report.capacity, float) else ", ".join(map(str, report.capacity))
    title = Text(f"{report.architecture}, routing {report.routing} ({causal}), γ {capacity}: ", "bold")
    title.append(f"{summary.routed_share:.0%} of the tokens of {len(summary.layers)} routed layers", "not bold")
    render.out.print(title)
    counts = f"{summary.tokens:,} tokens"
    if summary.texts > 1:
        counts = f"{summary.texts:,} documents, {counts}"
    if summary.windows > summary.texts:
        counts += f" in {summary.windows} windows"
    parts = [counts]
    if summary.loss is not None:
        parts.append(f"loss {summary.loss:.3f} nats")
    if summary.driven_by_ce is not None:
        parts.append(f"CE drove {summary.driven_by_ce:.0%} of the choices, CU {1 - summary.driven_by_ce:.0%}")
    render.out.print(Text("  ·  ".join(parts), "dim"), Text(), sep="\n")


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
    from dtfcli.inspection.palette import blend, channels

    red, green, blue = channels(blend(_STOPS, depth / max(1, layers)))
    return f"white on rgb({red},{green},{blue})"


def _left_out(tokens: int, shown: int) -> None:
    if tokens > shown:
        note = f"… {tokens - shown:,} more tokens; --html and --output have all."
        render.out.print(note, style="dim", markup=False)


def _heat_map(report: "TextRouting", width: int) -> "Text":
    """Layers × tokens, wrapped: · a token that passed by, ▒▓█ one that was routed, by the rank of its score."""
    from rich.text import Text

    shown = min(len(report.source), _HEAT_SHOWN)
    room = max(10, width - 10)
    ranks = [layer.score.argsort().argsort() / len(layer.score) for layer in report.layers]
    heat = Text("\n")
    for start in range(0, shown, room):
        stop = min(start + room, shown)
        heat.append(f"tokens {start} to {stop - 1}\n", "dim")
        for layer, rank in reversed(list(zip(report.layers, ranks, strict=True))):
            heat.append(f"layer {layer.layer:<3} ", "dim")
            for t in range(start, stop):
                if layer.selected[t]:
                    high = rank[t]
                    heat.append("█" if high > 2 / 3 else "▓" if high > 1 / 3 else "▒", "rgb(225,90,20)")
                else:
                    heat.append("·", "rgb(110,110,120)")
            heat.append("\n")
    heat.append("· passed by  ▒▓█ routed, low to high score\n", "dim")
    return heat


def _extremes(report: "TextRouting") -> "Text":
    """Which tokens, by their text, get most and least depth on average; those that occur most often first in a tie."""
    from rich.text import Text

    from dtfcli.inspection.tokens import short

    found: dict[str, list[int]] = {}
    depths = report.depth
    for t, piece in enumerate(report.source.pieces):
        if not report.sinks[t]:
            found.setdefault(short(piece), []).append(depths[t])
    ranked = sorted(found.items(), key=lambda item: (-sum(item[1]) / len(item[1]), -len(item[1])))
    lowest = sorted(found.items(), key=lambda item: (sum(item[1]) / len(item[1]), -len(item[1])))
    lines = Text("\n")
    for title, items in (("most routed ", ranked), ("least routed", lowest)):
        lines.append(title + "  ", "bold")
        for text, seen in items[:_EXTREMES]:
            mean = sum(seen) / len(seen)
            lines.append(f" {text} ", _style(mean, len(report.layers)))
            lines.append(f" {mean:.3g}" + (f"×{len(seen)}" if len(seen) > 1 else "") + "  ", "dim")
        lines.append("\n")
    return lines


def _show_tables(summary: "Summary") -> None:
    from rich.text import Text

    from dtfcli.inspection.tables import all_tables

    for data in all_tables(summary):
        title = Text(f"\n{data.title}  ", "bold").append(data.note, "not bold dim")
        render.out.print(title, _table(data), sep="\n")
    if summary.depth_with_loss is not None:
        own, following = summary.depth_with_loss, summary.depth_with_next_loss
        line = f"\ndepth with the token's loss r = {own:+.2f}"
        line += "" if following is None else f", with the next token's r = {following:+.2f}"
        render.out.print(line, markup=False)


def _table(data: "TableData") -> Any:
    rows = [[_cell(kind, value) for (_, kind), value in zip(data.columns, row, strict=True)] for row in data.rows]
    return render.table([name for name, _ in data.columns], rows)


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
