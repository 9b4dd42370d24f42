"""The report of a study as data: means over seeds, differences to a control, cost; as JSON and as Markdown."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtfcli.errors import ConfigError
from dtfcli.studies.measure import Measured
from dtfcli.studies.statistics import Difference, differences


@dataclass(frozen=True)
class Finished:
    """A finished run of a study: its point, seed and folder, and what it is worth."""

    cell: str
    seed: int
    folder: Path
    measured: Measured


@dataclass(frozen=True)
class Timing:
    """Time of a trained model over dense, from `dtf bench`, on random tokens.

    Attributes:
        prefill, decode: of one forward pass of a prompt, and of a decoded token.
        prefill_share, decode_share: of tokens routed meanwhile; None for dense.
    """

    prefill: float
    decode: float
    prefill_share: float | None = None
    decode_share: float | None = None

    @property
    def cells(self) -> list[str]:
        """Both times for a table, each with the share it was measured at."""
        pairs = ((self.prefill, self.prefill_share), (self.decode, self.decode_share))
        return [f"{time:.3f}" + ("" if share is None else f" at {share:.2f}") for time, share in pairs]


@dataclass(frozen=True)
class Row:
    """A point of the grid, over its seeds.

    Attributes:
        name: of the point.
        seeds: how many.
        loss, sd: mean and standard deviation of the causal validation loss, nats per token.
        routed_share: mean; None for dense.
        flop_ratio: FLOPs of a forward pass over the dense model's, at the realized share.
        timing: None where it was not measured.
    """

    name: str
    seeds: int
    loss: float
    sd: float | None
    routed_share: float | None
    flop_ratio: float | None
    timing: Timing | None


@dataclass(frozen=True)
class StudyReport:
    """What a study found.

    Attributes:
        title: what was compared.
        rows: one for each point, in the order of the grid.
        differences: of every other point to the control.
        curves: point → list over seeds of (step, causal validation loss).
        runs: folder of each run, by point and seed.
    """

    title: str
    rows: list[Row]
    differences: list[Difference]
    curves: dict[str, list[list[tuple[int, float]]]]
    runs: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = [asdict(d) | {"sentence": d.sentence, "is_found": d.is_found} for d in self.differences]
        return asdict(self) | {"differences": found}

    def to_markdown(self) -> str:
        """The tables and sentences."""
        lines = [f"# {self.title}", "", "| | val/loss | routed | FLOPs / dense | prefill / dense | decode / dense |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += ["| " + " | ".join([row.name, *_cells(row)]) + " |" for row in self.rows]
        lines += ["", "Causal validation loss in nats per token, mean ± standard deviation over seeds.", ""]
        lines += [f"- {difference.sentence}" for difference in self.differences]
        return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    spread = "" if row.sd is None else f" ± {row.sd:.3f}"
    times = ["", ""] if row.timing is None else row.timing.cells
    share = "" if row.routed_share is None else f"{row.routed_share:.3f}"
    return [f"{row.loss:.3f}{spread}", share, "" if row.flop_ratio is None else f"{row.flop_ratio:.3f}", *times]


def make_report(
    title: str, runs: Sequence[Finished], control: str, timings: dict[str, Timing] | None = None
) -> StudyReport:
    """Put a report together.

    Args:
        title: what was compared.
        runs: all finished.
        control: the point that the others are compared with.
        timings: by point.

    Raises:
        ConfigError: fewer than two points, or an unknown control.
    """
    by_cell: dict[str, list[Finished]] = {}
    for run in runs:
        by_cell.setdefault(run.cell, []).append(run)
    if len(by_cell) < 2:
        raise ConfigError(
            f"{title}: all runs are of one point, {next(iter(by_cell), '')}; there is nothing to compare."
        )
    dense = [run.measured.flops for run in runs if run.measured.routed_share is None]
    losses = {cell: {run.seed: run.measured.losses for run in own} for cell, own in by_cell.items()}
    rows = [_row(cell, own, dense[0] if dense else None, (timings or {}).get(cell)) for cell, own in by_cell.items()]
    return StudyReport(
        title,
        rows,
        differences(losses, control),
        {cell: [run.measured.curve for run in own] for cell, own in by_cell.items()},
        {f"{run.cell}, seed {run.seed}": str(run.folder) for run in runs},
    )


def _row(cell: str, runs: list[Finished], dense_flops: float | None, timing: Timing | None) -> Row:
    losses = [run.measured.loss for run in runs]
    shares = [run.measured.routed_share for run in runs if run.measured.routed_share is not None]
    flops = statistics.fmean(run.measured.flops for run in runs)
    return Row(
        cell,
        len(runs),
        statistics.fmean(losses),
        statistics.stdev(losses) if len(losses) > 1 else None,
        statistics.fmean(shares) if shares else None,
        None if dense_flops is None else flops / dense_flops,
        timing,
    )


def default_control(cells: Sequence[str]) -> str:
    """The point that others are compared with unless told: random, else dense, else the first."""
    for wanted in ("random", "dense"):
        for cell in cells:
            if cell.split()[0] == wanted:
                return cell
    return cells[0]
