"""The files of a report: JSON, Markdown, a figure, and one self-contained HTML page without script and network."""

import base64
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from dtfcli.studies.figure import draw_study
from dtfcli.studies.report import AGREEMENT_LEGEND, COLUMNS, LEGEND, StudyReport

JSON_FILE, MARKDOWN_FILE, FIGURE_FILE, PAGE_FILE = "report.json", "report.md", "report.png", "report.html"


def write_report(report: StudyReport, folder: Path) -> list[Path]:
    """Write the four files into a folder; returns them, the page last."""
    files = [folder / name for name in (JSON_FILE, MARKDOWN_FILE, FIGURE_FILE, PAGE_FILE)]
    files[0].write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
    files[1].write_text(report.to_markdown(), "utf-8")
    draw_study(report, files[2])
    heads, rows = report.agreement_table()
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("page.html.jinja").render(
        report=report,
        columns=COLUMNS,
        legend=LEGEND,
        agreement_heads=heads,
        agreement_rows=rows,
        agreement_legend=AGREEMENT_LEGEND,
        picture=base64.b64encode(files[2].read_bytes()).decode(),
    )
    files[3].write_text(page, "utf-8")
    return files
