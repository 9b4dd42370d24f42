"""A self-contained HTML page of a text's or a corpus's routing: no network, no dependency, one file.

The page's markup, style and script lie in this folder; figures travel in it as JSON. The content policy of the page
allows exactly this style and this script (by hash) and nothing from anywhere else.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from importlib import resources
from typing import Any

from dtfcli.errors import plain
from dtfcli.inspection.corpus import CorpusRouting
from dtfcli.inspection.palette import LEVELS, SEQUENTIAL, readable_on, shades
from dtfcli.inspection.statistics import Summary
from dtfcli.inspection.tables import all_tables, key_figures
from dtfcli.inspection.text import TextRouting

_DIGITS = 4
"""Significant digits of the page's figures; the JSON output has all."""


def render_page(report: TextRouting | CorpusRouting, summary: Summary) -> str:
    """The page, ready to be written to a file."""
    style = view_style() + _part("page.css")
    script = _part("page.js")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy += "; base-uri 'none'; form-action 'none'"
    data = embed_json(page_data(report, summary))
    title = f"Routing of {report.model or report.architecture}"
    title = html.escape(title).encode("utf-8", "replace").decode()
    parts = {"title": title, "policy": policy, "style": style, "data": data, "script": script}
    pieces = _part("page.html").split("%%")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def page_data(report: TextRouting | CorpusRouting, summary: Summary) -> dict[str, Any]:
    """What the page's script reads."""
    badges = [report.gamma]
    if isinstance(report, CorpusRouting):
        badges.append(report.file)
    if summary.windows > summary.texts:
        badges.append(f"{summary.windows} windows, each routed on its own")
    data: dict[str, Any] = {
        "title": report.model or report.architecture,
        "name": report.name,
        "routing": report.routing,
        "causal": report.causal,
        "badges": badges,
        "rule": report.reading.rule,
        "figures": [asdict(figure) for figure in key_figures(report, summary)],
        "tables": [table.to_dict() for table in all_tables(report, summary)],
    }
    if isinstance(report, TextRouting):
        data["text"] = _text_data(report)
    return plain(data)


def _text_data(report: TextRouting) -> dict[str, Any]:
    names = sorted(set(report.classes))
    return {
        "labels": report.reading.labels,
        "skipping": "takes the forecast" if report.bypass == "forecast" else "passed by",
        "pieces": report.source.pieces,
        "gaps": report.source.gaps,
        "tail": report.source.tail,
        "ids": report.source.ids,
        "special": [i for i, special in enumerate(report.source.special) if special],
        "code": any(line.startswith(("    ", "\t")) for line in report.source.text.splitlines()),
        "classNames": names,
        "classes": [names.index(name) for name in report.classes],
        "windows": report.windows,
        "depth": report.depth,
        "sinks": [i for i, sink in enumerate(report.sinks) if sink],
        "loss": _rounded(report.loss),
        "layers": [
            {
                "layer": layer.layer,
                "threshold": layer.shown_threshold,
                "selected": "".join("1" if chosen else "0" for chosen in layer.selected),
                "score": _rounded(layer.score),
                "measures": {
                    name: _rounded(values) for name, values in layer.measures().items() if name in report.reading.labels
                },
            }
            for layer in report.layers
        ],
    }


def embed_json(data: Any) -> str:
    """JSON that may stand in a <script> element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in map(float, values)]


def view_style() -> str:
    """Colors, and the rules of tokens, legend and figures: all that draws them shares it."""
    return _part("view.css").replace("/*palette*/", _palette_css())


def _palette_css() -> str:
    """Background and text color of each level, light and dark, as custom properties and classes."""
    light, dark = (
        "".join(f"--c{level}:{shade};--cf{level}:{readable_on(shade)};" for level, shade in enumerate(shades(stops)))
        for stops in SEQUENTIAL
    )
    rules = "".join(f".c{level}{{background-color:var(--c{level});color:var(--cf{level})}}" for level in range(LEVELS))
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f":root[data-theme=dark]{{{dark}}}{rules}"
    )


def _part(name: str) -> str:
    return resources.files("dtfcli.inspection").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    """How a content policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
