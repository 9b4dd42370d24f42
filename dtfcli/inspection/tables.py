"""The tables of a report, as plain values: what page and terminal both show."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dtfcli.inspection.agreement import Agreement
from dtfcli.inspection.oracle import CHOOSERS, OracleRouting
from dtfcli.inspection.sensitivity import Sensitivity
from dtfcli.inspection.statistics import POSITIONS, GroupRow, Summary
from dtfcli.statistics import Difference

Kind = Literal["text", "count", "share", "number", "difference"]
"""How a column is shown: a share as a percentage, a difference with its sign."""

_TITLES = {
    "class": ("Token class", "what kind of token"),
    "frequency": ("Frequency", "how often the token occurs in what was read"),
    "position": ("Position", "tokens before it in its row"),
    "loss": ("Loss", "how badly the token was predicted, nats"),
}
_MEASURES = {
    "static_surprise": "D_st",
    "change_surprise": "D_ch",
    "s_ce": "S_CE",
    "s_cu": "S_CU",
    "gate": "gate",
}


@dataclass(frozen=True)
class TableData:
    """One table.

    Attributes:
        key: a name for programs.
        title, note: for people; the note says what is counted.
        columns: title and kind of each.
        rows: values or None; a share may be a pair of value and standard error.
    """

    key: str
    title: str
    note: str
    columns: list[tuple[str, Kind]]
    rows: list[list[Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For the page."""
        return {
            "key": self.key,
            "title": self.title,
            "note": self.note,
            "columns": [{"name": name, "kind": kind} for name, kind in self.columns],
            "rows": self.rows,
        }


def all_tables(summary: Summary) -> list[TableData]:
    """Layers, groups, positions by layer, agreement of modes, and the oracle."""
    tables = [layers_table(summary)]
    tables += [group_table(grouping, rows) for grouping, rows in summary.groups.items()]
    if summary.layers:
        tables.append(positions_table(summary))
    if summary.agreement is not None:
        tables.append(agreement_table(summary.agreement))
    if summary.oracle is not None:
        tables += oracle_tables(summary.oracle)
    return tables


def layers_table(summary: Summary) -> TableData:
    """Share, threshold, means of the measures, and for DTF which criterion drove the choice."""
    dtf = any("ce_part" in layer.means for layer in summary.layers)
    names = [name for name in _MEASURES if any(name in layer.means for layer in summary.layers)]
    columns: list[tuple[str, Kind]] = [("layer", "count"), ("routed", "share")]
    with_threshold = any(layer.threshold is not None for layer in summary.layers)
    if with_threshold:
        columns.append(("threshold", "number"))
    columns += [(_MEASURES[name], "number") for name in names]
    if dtf:
        columns += [("by CE", "share"), ("rank CE", "share")]
    rows = []
    for layer in summary.layers:
        row: list[Any] = [layer.layer, layer.routed_share]
        row += [layer.threshold] if with_threshold else []
        row += [layer.means.get(name) for name in names]
        row += [layer.driven_by_ce, layer.ranking_by_ce] if dtf else []
        rows.append(row)
    note = "means over tokens" + (" that are not sinks" if summary.sinks else "")
    if dtf:
        note += (
            "; by CE: routed tokens whose score owes more to CE than to CU; rank CE: CE's part in the score's variance"
        )
    return TableData("layers", "Layers", note, columns, rows)


def group_table(grouping: str, rows: Sequence[GroupRow]) -> TableData:
    """Depth by one way of telling tokens apart, with standard errors."""
    title, note = _TITLES[grouping]
    dtf = any(row.static_surprise is not None for row in rows)
    columns: list[tuple[str, Kind]] = [
        (grouping, "text"),
        ("tokens", "count"),
        ("routed", "share"),
        ("depth", "number"),
    ]
    columns += [("D_st", "number")] if dtf else []
    columns.append(("loss", "number"))
    table = TableData(grouping, title, f"{note}; ± standard error as if tokens were independent", columns)
    for row in rows:
        cells: list[Any] = [row.name, row.tokens, [row.routed_share, row.routed_error], [row.depth, row.depth_error]]
        cells += [[row.static_surprise, row.static_error]] if dtf else []
        table.rows.append([*cells, row.loss])
    return table


def positions_table(summary: Summary) -> TableData:
    """Routed share by layer and position."""
    present = [name for name in POSITIONS if any(name in layer.positions for layer in summary.layers)]
    columns: list[tuple[str, Kind]] = [("layer", "count"), *((name, "share") for name in present)]
    rows = [
        [layer.layer, *(layer.positions.get(name, {}).get("routed_share") for name in present)]
        for layer in summary.layers
    ]
    return TableData("positions", "Layers by position", "routed share by a token's position in its row", columns, rows)


def agreement_table(agreement: Agreement) -> TableData:
    """Shares of two ways of routing and how far they agree, by layer and overall."""
    first, second = agreement.first, agreement.second
    columns: list[tuple[str, Kind]] = [
        ("layer", "text"),
        (first, "share"),
        (second, "share"),
        ("same", "share"),
        ("Jaccard", "number"),
        ("κ", "number"),
    ]
    rows: list[list[Any]] = [
        [name, *overlap.shares, overlap.same, overlap.jaccard, overlap.kappa]
        for name, overlap in [*((str(i), o) for i, o in agreement.layers.items()), ("all", agreement.overall)]
    ]
    note = "same text, same γ; topk sees the whole text and is not causal"
    return TableData("modes", f"{first} against {second}", note, columns, rows)


def oracle_tables(oracle: OracleRouting) -> list[TableData]:
    """By layer, how far the router agrees with the oracle; and the loss while router, oracle, chance or all choose."""
    columns: list[tuple[str, Kind]] = [("layer", "count"), ("ρ", "number"), ("Jaccard", "number"), ("κ", "number")]
    layers = TableData(
        "oracle",
        "Against the oracle",
        "the oracle takes the tokens that the layer would change most, as many as the router; ρ: Spearman's, of scores "
        "with sizes",
        columns,
        [
            [index, layer.rank_correlation, layer.overlap.jaccard, layer.overlap.kappa]
            for index, layer in oracle.layers.items()
        ],
    )
    columns = [("chosen by", "text"), ("loss", "number"), ("− router's", "difference")]
    losses = TableData(
        "ceiling",
        "Who chooses",
        "nats per token while somebody else chooses as many tokens; ± standard error over documents",
        columns,
        [
            [name, oracle.losses[name].mean, _with_error(oracle.difference(name)) if name != "router" else None]
            for name in CHOOSERS
        ],
    )
    return [layers, losses]


def _with_error(difference: Difference) -> list[float | None]:
    return [difference.value, difference.stderr]


def sensitivity_table(found: Sensitivity) -> TableData:
    """What each layer costs to leave out."""
    columns: list[tuple[str, Kind]] = [("layer", "count"), ("routed", "text"), ("cost", "difference")]
    rows = [[layer, "yes" if layer in found.routed else "", _with_error(found.cost(layer))] for layer in found.layers]
    note = "loss without the layer minus that with all, nats per token; ± standard error over documents"
    return TableData("sensitivity", "Without a layer", note, columns, rows)
