"""The display of `dtf convert`: the table of the dial."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dtfcli.cli import render

if TYPE_CHECKING:
    from dtfcli.conversion.estimate import Estimate
    from dtfcli.conversion.report import ConversionReport


def show_estimate(account: "Estimate") -> None:
    """Print what a conversion will take."""
    weights, added = account.weights_bytes / 1e9, account.added_bytes / 1e9
    layers = account.routed_layers
    rows = [
        ("parameters", f"{account.parameters:,}", f"{weights:.2f} GB in {account.dtype}"),
        ("added", f"{added:.2f} GB", f"{added / weights:.0%} of the weights"),
        ("saved", f"{account.saving:.1%}", f"of a forward pass's FLOPs, at γ {account.capacity:.3f}"),
        ("routed", f"{len(layers)} layers", f"{layers[0]} to {layers[-1]}"),
        *((f"layer {layer}", "dense", reason) for layer, reason in account.stays_dense.items()),
        ("tokens to fit", f"{account.fit_tokens:,}", f"computed in {account.precision} on {account.device}"),
        *((part.name, f"{(part.peak_bytes or 0) / 1e9:.1f} GB", _hours(part.cpu_seconds)) for part in account.parts),
    ]
    render.show_table(("", "", "estimated"), rows, title=f"{account.model}, on paper")


def _hours(seconds: float) -> str:
    return f"{seconds:.0f} s of processor time" if seconds < 7200 else f"{seconds / 3600:.1f} h of processor time"


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
