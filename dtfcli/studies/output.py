"""The files of a report: JSON, Markdown, a figure and a page."""

import json
from pathlib import Path

from dtfcli.studies.figure import draw_study
from dtfcli.studies.page import render_study
from dtfcli.studies.report import StudyReport

JSON_FILE, MARKDOWN_FILE, FIGURE_FILE, PAGE_FILE = "report.json", "report.md", "report.png", "report.html"


def write_report(report: StudyReport, folder: Path) -> list[Path]:
    """Write the four files into a folder; returns them, the page last."""
    files = [folder / name for name in (JSON_FILE, MARKDOWN_FILE, FIGURE_FILE, PAGE_FILE)]
    files[0].write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
    files[1].write_text(report.to_markdown(), "utf-8")
    draw_study(report, files[2])
    files[3].write_text(render_study(report, files[2].read_bytes()), "utf-8")
    return files
