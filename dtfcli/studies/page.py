"""A study as one self-contained HTML page: no script, no network."""

import base64
from collections.abc import Sequence
from html import escape

from dtfcli.studies.report import AGREEMENT_LEGEND, COLUMNS, LEGEND, StudyReport

_STYLE = """
:root{color-scheme:light dark;--ink:#1d1b18;--soft:#6a655c;--edge:#dcd7cd;--paper:#fbfaf7}
@media(prefers-color-scheme:dark){:root{--ink:#ece7dd;--soft:#a39c8f;--edge:#3a362f;--paper:#191713}}
body{margin:2rem auto;max-width:62rem;padding:0 1rem;font:16px/1.5 system-ui,sans-serif}
body{color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem;border-bottom:1px solid var(--edge);text-align:right}
th:first-child,td:first-child{text-align:left}
p,li{max-width:46rem}.soft{color:var(--soft)}img{width:100%;background:#fff;border-radius:.4rem}
"""


def render_study(report: StudyReport, picture: bytes) -> str:
    """The page, with the figure inside."""
    intervals = [
        (
            d.title,
            f"{d.value:+.4f}",
            _interval(d.by_seed),
            _interval(d.by_document),
            f"{d.p_holm:.3g}",
            "yes" if d.is_found else "no",
        )
        for d in report.differences
    ]
    heads = ("", "nats", "95 % by seed", "95 % by document", "p (Holm)", "difference")
    sentences = "".join(f"<li>{escape(d.sentence)}</li>" for d in report.differences)
    runs = "".join(f"<li>{escape(name)}: <code>{escape(folder)}</code></li>" for name, folder in report.runs.items())
    image = base64.b64encode(picture).decode()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body><h1>{escape(report.title)}</h1>"
        f"<ul>{sentences}</ul>{_table(COLUMNS, [row.cells for row in report.rows])}"
        f'<p class="soft">{escape(LEGEND)}</p>'
        f"<h2>Differences</h2>{_table(heads, intervals)}"
        f"{_agreement(report)}"
        '<h2>Figure</h2><img alt="Differences, learning curves, loss against cost" '
        f'src="data:image/png;base64,{image}">'
        f"<h2>Runs</h2><ul>{runs}</ul></body></html>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _agreement(report: StudyReport) -> str:
    heads, rows = report.agreement_table()
    legend = f'<p class="soft">{escape(AGREEMENT_LEGEND)}</p>'
    return f"<h2>Who is routed</h2>{_table(heads, rows)}{legend}" if rows else ""


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"
