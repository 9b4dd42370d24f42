"""The figures of a report as plain values: key figures and tables, for page, figure and terminal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dtfcli.inspection.agreement import Agreement
from dtfcli.inspection.oracle import CHOOSERS
from dtfcli.inspection.sensitivity import Sensitivity
from dtfcli.inspection.statistics import GroupRow, Summary
from dtfcli.inspection.text import Inspected
from dtfcli.statistics import Difference

Kind = Literal["text", "count", "share", "number", "difference"]
"""How a column is shown: a share as a percentage, a difference with its sign."""
Column = tuple[str, Kind]

_TITLES = {
    "class": ("Token class", "What kind of token. ± standard error, here and below, as if tokens were independent."),
    "position": ("Position", "Tokens before it in its row."),
    "loss": ("Loss", "How badly the token was predicted, nats."),
}


@dataclass(frozen=True)
class KeyFigure:
    """One number that stands above everything else, for people."""

    name: str
    value: str
    note: str  # of how many, or in which unit


@dataclass(frozen=True)
class TableData:
    """One table.

    Attributes:
        key: a name for programs.
        title, note: for people; the note names the unit.
        columns: title and kind of each.
        rows: values or None; a share, number or difference may be a pair of value and standard error.
    """

    key: str
    title: str
    note: str
    columns: list[Column]
    rows: list[list[Any]]

    def to_dict(self) -> dict[str, Any]:
        """For the page."""
        return asdict(self) | {"columns": [{"name": name, "kind": kind} for name, kind in self.columns]}


def key_figures(report: Inspected, summary: Summary) -> list[KeyFigure]:
    """The numbers to read first."""
    layers = f"of all tokens, over {len(summary.layers)} layers"
    figures = [KeyFigure("Routed", f"{summary.routed_share:.1%}", layers)]
    if report.bypass == "forecast":
        figures.append(KeyFigure("Forecast", f"{1 - summary.routed_share:.1%}", "take a layer's forecast instead"))
    if summary.oracle is not None and summary.oracle.missed is not None:
        figures.append(KeyFigure("Forecast misses", f"{summary.oracle.missed:.1%}", "of a skipping token's update"))
    sinks = f"{summary.sinks} sink{'' if summary.sinks == 1 else 's'}" if summary.sinks else ""
    texts = f"{summary.texts:,} documents" if summary.texts > 1 else sinks
    figures.append(KeyFigure("Tokens", f"{summary.tokens:,}", texts))
    if summary.loss is not None:
        figures.append(KeyFigure("Loss", f"{summary.loss:.3f}", "nats per token"))
    figures += [KeyFigure(name, f"{share:.1%}", "of the choices") for name, share in summary.criteria.items()]
    if summary.agreement is not None:
        jaccard = summary.agreement.overall.jaccard
        figures.append(KeyFigure("Causal and top-K", f"{jaccard:.3f}", "Jaccard of the routed sets"))
    return figures


def all_tables(report: Inspected, summary: Summary) -> list[TableData]:
    """Layers, groups, agreement of modes, and the oracle."""
    tables = [layers_table(report, summary)]
    tables += [group_table(grouping, rows) for grouping, rows in summary.groups.items()]
    if summary.agreement is not None:
        tables.append(agreement_table(summary.agreement))
    if summary.oracle is not None:
        tables += oracle_tables(summary)
    return tables


def layers_table(report: Inspected, summary: Summary) -> TableData:
    """Share and threshold of each layer, and its figures: of a predicted cost for tokens that enter and that skip."""
    reading, layers = report.reading, summary.layers
    columns: list[Column] = [("layer", "count"), ("routed", "share")]
    cells: list[list[Any]] = [[layer.layer for layer in layers], [layer.routed_share for layer in layers]]

    def add(name: str, kind: Kind, values: list[Any]) -> None:
        if any(value is not None for value in values):
            columns.append((name, kind))
            cells.append(values)

    if report.bypass == "forecast":
        add("forecast", "share", [1 - layer.routed_share for layer in layers])
    add("threshold", "number", [layer.shown_threshold for layer in layers])
    for name, label in reading.labels.items():
        if name == "predicted_cost":
            add(f"{label}: routed", "number", [layer.routed_means.get(name) for layer in layers])
            add("skipping", "number", [layer.skipping_means.get(name) for layer in layers])
        elif name not in ("ce_part", "true_cost"):
            add(label, "number", [layer.means.get(name) for layer in layers])
    for name in layers[0].criteria:
        add(name, "share", [layer.criteria[name] for layer in layers])
    note = f"Means over tokens{' that are not sinks' if summary.sinks else ''}. {reading.explanation}".strip()
    return TableData("layers", "Layers", note, columns, [list(row) for row in zip(*cells, strict=True)])


def group_table(grouping: str, rows: Sequence[GroupRow]) -> TableData:
    """Routed share and loss by one way of grouping tokens."""
    columns: list[Column] = [(grouping, "text"), ("tokens", "count"), ("routed", "share"), ("loss", "number")]
    cells = [[row.name, row.tokens, [row.routed_share, row.routed_error], row.loss] for row in rows]
    return TableData(grouping, *_TITLES[grouping], columns, cells)


def agreement_table(agreement: Agreement) -> TableData:
    """Shares of two ways of routing and how far they agree, by layer and overall."""
    first, second = agreement.first, agreement.second
    columns: list[Column] = [("layer", "text"), (first, "share"), (second, "share")]
    columns += [("same", "share"), ("Jaccard", "number"), ("κ", "number")]
    overlaps = {**{str(layer): overlap for layer, overlap in agreement.layers.items()}, "all": agreement.overall}
    rows = [[name, *overlap.shares, overlap.same, overlap.jaccard, overlap.kappa] for name, overlap in overlaps.items()]
    note = "The same text at the same γ. topk sees the whole text and is not causal."
    return TableData("modes", f"{first} against {second}", note, columns, rows)


def oracle_tables(summary: Summary) -> list[TableData]:
    """By layer, what forecasts miss and how far the router agrees with the oracle; the loss by who chooses."""
    oracle = summary.oracle
    assert oracle is not None, "only asked for if it was measured"
    forecasts = oracle.missed is not None
    columns: list[Column] = [("layer", "count"), ("lost: routed", "number"), ("skipping", "number")]
    columns += [("missed: routed", "share"), ("skipping", "share")] if forecasts else []
    columns += [("ρ", "number"), ("Jaccard", "number"), ("κ", "number")]
    rows = []
    for layer in summary.layers:
        against = oracle.layers[layer.layer]
        row: list[Any] = [layer.layer, layer.routed_means.get("true_cost"), layer.skipping_means.get("true_cost")]
        row += reversed(against.missed_shares) if forecasts else []
        rows.append([*row, against.rank_correlation, against.overlap.jaccard, against.overlap.kappa])
    note = "Lost: what a token loses by skipping, or would lose, root mean square per element. "
    if forecasts:
        note += "Missed: the share of a token's update that its forecast misses, ‖Δ − f‖² / ‖Δ‖². "
    note += "ρ: Spearman's, of scores with losses. Jaccard, κ: of the router's tokens with the tokens that lose most."
    choosers: list[Column] = [("chosen by", "text"), ("loss", "number"), ("− router's", "difference")]
    losses = [
        [name, oracle.losses[name].mean, _with_error(oracle.difference(name)) if name != "router" else None]
        for name in CHOOSERS
    ]
    loss_note = "Nats per token if another chooser takes as many tokens. ± standard error over documents."
    return [
        TableData("oracle", "Against the oracle", note, columns, rows),
        TableData("ceiling", "Who chooses", loss_note, choosers, losses),
    ]


def _with_error(difference: Difference) -> list[float | None]:
    return [difference.value, difference.stderr]


def sensitivity_table(sensitivity: Sensitivity) -> TableData:
    """The cost of each layer: the loss without it."""
    columns: list[Column] = [("layer", "count"), ("routed", "text"), ("cost", "difference")]
    rows = [
        [layer, "yes" if layer in sensitivity.routed else "", _with_error(sensitivity.cost(layer))]
        for layer in sensitivity.layers
    ]
    note = "Loss without the layer minus that with all, nats per token. ± standard error over documents."
    return TableData("sensitivity", "Without a layer", note, columns, rows)
