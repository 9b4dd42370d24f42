"""`dtf inspect-routing`: a heat map of which tokens enter which layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtfcli.cli import options

if TYPE_CHECKING:
    from rich.text import Text

    from dtfcli.inspection import TextRouting

SAMPLE = '''def factorial(n):
    """Return n!, the product 1 * 2 * ... * n."""
    if n < 0:
        raise ValueError("n must not be negative")
    return 1 if n == 0 else n * factorial(n - 1)
'''


def inspect_routing(
    model: options.Model,
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="Text to route; a short program by default.", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the text from this file.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write everything as JSON to this file.")] = None,
    routing: options.Routing = "auto",
    capacity: options.Capacity = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attn_implementation: options.AttnImplementation = "sdpa",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Show which tokens a routed model spends its layers on.

    The text appears colored by depth (how many routed layers took each token), then as a heat map, a row for each
    routed layer and a column for each token, then with figures for each layer.

    \b
    Examples:
      dtf inspect-routing outputs/2026-01-31/quickstart
      dtf inspect-routing MODEL "The cat sat on the mat." --capacity 0.25
      dtf inspect-routing MODEL --file module.py --output routing.json
    """
    from dtfcli.cli import render
    from dtfcli.errors import ConfigError

    if text is not None and file is not None:
        raise ConfigError("TEXT and --file: give one of them.")
    if file is not None:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {file}: cannot be read as UTF-8 text ({error}).") from error
    if output is not None and output.exists():
        raise ConfigError(f"--output {output}: exists already; name another file.")

    from dtfcli.factory import load_model, load_tokenizer
    from dtfcli.inspection import inspect_text

    loaded = load_model(
        model,
        routing=routing,
        capacity=capacity,
        device=device,
        dtype=dtype,
        revision=revision,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    report = inspect_text(loaded, tokenizer, SAMPLE if text is None else text)
    if output is not None:
        render.write_json(report.to_dict(), output)
        render.note(f"everything in {output}")
    if json:
        render.emit_json(report.to_dict())
    else:
        show(report)


def show(report: "TextRouting") -> None:
    """Print a text colored by depth, its heat map and the figures of each layer."""
    from rich.text import Text

    from dtfcli.cli import render

    layers = len(report.layers)
    causal = "causal" if report.routing == "threshold" else "not causal"
    title = f"{report.architecture}, routing {report.routing} ({causal}), γ {report.capacity}: "
    render.out.print(Text(title, "bold") + Text(f"{report.routed_share:.0%} of the tokens of {layers} routed layers\n"))
    legend = Text("depth  ")
    for depth in range(layers + 1):
        legend.append(f" {depth} ", _style(depth, layers))
    render.out.print(legend, Text(), colored(report), sep="\n")
    render.out.print(_heat_map(report, render.out.width))
    render.out.print(_figures(report))


def _style(depth: int, layers: int) -> str:
    """From dim gray (no routed layer) over blue and violet to orange (all of them); readable on dark and light."""
    share = depth / max(1, layers)
    stops = [(110, 110, 120), (60, 90, 200), (160, 50, 170), (225, 90, 20)]
    place = share * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return f"white on rgb({red},{green},{blue})"


def colored(report: "TextRouting", first: int = 0) -> "Text":
    """The text from token `first` on, each token on the color of its depth."""
    from rich.text import Text

    painted = Text()
    for token, depth in list(zip(report.tokens, report.depth, strict=True))[first:]:
        for i, line in enumerate(token.split("\n")):
            if i:
                painted.append("⏎", _style(depth, len(report.layers)))
                painted.append("\n")
            painted.append(line.replace("\t", "    "), _style(depth, len(report.layers)))
    return painted


def _heat_map(report: "TextRouting", width: int) -> "Text":
    """Layers × tokens, wrapped: ░ a token that passed by, ▒▓█ one that was routed, by the rank of its score."""
    from rich.text import Text

    room = max(10, width - 10)
    heat = Text("\n")
    for start in range(0, len(report.tokens), room):
        stop = min(start + room, len(report.tokens))
        heat.append(f"tokens {start} to {stop - 1}\n", "dim")
        for layer in report.layers:
            ranked = sorted(layer.score)
            heat.append(f"layer {layer.layer:<3}", "dim")
            for t in range(start, stop):
                high = ranked.index(layer.score[t]) / len(ranked)
                if layer.selected[t]:
                    heat.append("█" if high > 2 / 3 else "▓" if high > 1 / 3 else "▒", "rgb(225,90,20)")
                else:
                    heat.append("░", "rgb(110,110,120)")
            heat.append("\n")
    return heat


def _figures(report: "TextRouting") -> Any:
    from dtfcli.cli import render

    names = ["static_surprise", "change_surprise", "s_ce", "s_cu", "gate"]
    titles = ["D_st", "D_ch", "S_CE", "S_CU", "gate"]
    if report.architecture != "dtf":
        names, titles = ["gate"], ["gate"]
    rows = []
    for layer in report.layers:
        figures = [layer.mean(name) for name in names]
        shown = ["–" if value is None else f"{value:.3f}" for value in figures]
        threshold = "–" if layer.threshold is None else f"{layer.threshold:.4g}"
        rows.append([layer.layer, f"{layer.routed_share:.0%}", threshold, *shown])
    return render.table(["layer", "routed", "threshold", *titles], rows)
