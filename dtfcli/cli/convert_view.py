"""The display of `dtf convert`: the table of the dial."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dtfcli.cli import render

if TYPE_CHECKING:
    from dtfcli.conversion.report import ConversionReport


def show(report: "ConversionReport", folder: Path) -> None:
    """Print the dial, the sentence and the remarks, where things are and what to do next."""
    from dtfcli.conversion.report import COLUMNS, LEGEND, MARKDOWN_FILE

    render.show_table(COLUMNS, report.rows, title=f"{report.model}, converted")
    render.out.print(LEGEND, style="dim", markup=False)
    render.out.print(report.sentence, markup=False)
    for note in report.notes:
        render.out.print(note, markup=False)
    seconds = sum(part.cpu_seconds for part in report.parts)
    peak = max((part.peak_bytes for part in report.parts if part.peak_bytes), default=None)
    render.note(f"{seconds:.0f} s of processor time" + ("" if peak is None else f", at most {peak / 1e9:.1f} GB"))
    render.note(f"Report: {folder / MARKDOWN_FILE}")
    if report.to != "mod":  # its remark says what it needs first
        prompt = "def main(" if report.text["name"] == "python-stdlib" else "Once upon a time"
        render.err.print("\nNext:", style="dim")
        command = f"dtf generate {shlex.quote(str(folder))} {shlex.quote(prompt)}"
        render.err.print(f"  {command}", markup=False, soft_wrap=True)
