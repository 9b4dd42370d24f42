"""The report of a study as data: means over seeds, differences to a control, cost; as JSON and as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from dtfcli.inspection.agreement import Overlap
from dtfcli.studies.differences import PointDifference, differences
from dtfcli.studies.measure import Curve, Finished
from dtfcli.studies.pairs import Pair


@dataclass(frozen=True)
class Timing:
    """Time of a trained model over dense, from `dtf bench`, on random tokens.

    Attributes:
        prefill, decode: of one forward pass of a prompt, and of a decoded token.
        prefill_share, decode_share: of tokens routed in that pass; None for dense.
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
        loss, sd: mean and standard deviation of the causal validation loss, nats per token.
        accuracy, accuracy_sd: the same of the share of held-out tokens that were the likeliest one.
        routed_share: mean; None for dense.
        flop_ratio: FLOPs of a forward pass over those of its own dense backbone, at the realized share.
        timing: None where it was not measured.
    """

    name: str
    seeds: int
    loss: float
    sd: float | None
    accuracy: float
    accuracy_sd: float | None
    routed_share: float | None
    flop_ratio: float
    timing: Timing | None

    @property
    def cells(self) -> list[str]:
        """A line of a table, under `COLUMNS`."""
        return [
            self.name,
            str(self.seeds),
            _with_spread(self.loss, self.sd, 4),
            _with_spread(self.accuracy, self.accuracy_sd, 3),
            _number(self.routed_share),
            _number(self.flop_ratio),
            *(["", ""] if self.timing is None else self.timing.cells),
        ]


COLUMNS = ("", "seeds", "val/loss", "accuracy", "routed", "FLOPs", "prefill", "decode")
"""Heads of `Row.cells`."""

LEGEND = (
    "Causal validation loss in nats per token and share of held-out tokens that were the likeliest one, mean ± "
    "standard deviation over seeds. FLOPs and times are over dense; times on random tokens, at the share routed there."
)
AGREEMENT_LEGEND = "Agreement of routed tokens on the same text: Cohen's κ, mean over layers and seeds; 0 is chance."


@dataclass(frozen=True)
class Agreed:
    """How far two points route the same tokens of the same held-out text.

    Attributes:
        kappa: Cohen's κ, mean over layers and seeds: 1 the same tokens, 0 as many as by chance; None: not defined.
        jaccard: tokens routed by both over tokens routed by either, over all layers and seeds.
    """

    first: str
    second: str
    kappa: float | None
    jaccard: float


@dataclass(frozen=True)
class StudyReport:
    """The results of a study.

    Attributes:
        rows: one for each point, in the order of the grid.
        agreement: of any two points in the tokens that they route.
        curves: point → list over seeds of causal validation losses during the run.
        share_curves: the same of the routed share.
        runs: "point, seed N" → folder.
    """

    title: str
    rows: list[Row]
    differences: list[PointDifference]
    agreement: list[Agreed]
    curves: dict[str, list[Curve]]
    share_curves: dict[str, list[Curve]]
    runs: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        differences = [asdict(d) | {"sentence": d.sentence, "is_found": d.is_found} for d in self.differences]
        return asdict(self) | {"differences": differences}

    def to_markdown(self) -> str:
        """The tables and sentences."""
        parts = [f"# {self.title}", _markdown(COLUMNS, [row.cells for row in self.rows]), LEGEND]
        parts.append("\n".join(f"- {difference.sentence}" for difference in self.differences))
        heads, rows = self.agreement_table()
        if rows:
            parts += [AGREEMENT_LEGEND, _markdown(heads, rows)]
        return "\n\n".join(parts) + "\n"

    def agreement_table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of a table of κ, a row and a column for each point that routes."""
        names = list(dict.fromkeys(name for pair in self.agreement for name in (pair.first, pair.second)))
        kappas = {(pair.first, pair.second): pair.kappa for pair in self.agreement}
        kappas |= {(second, first): kappa for (first, second), kappa in kappas.items()}
        return ["κ", *names], [[row, *(_number(kappas.get((row, column)), 2) for column in names)] for row in names]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _with_spread(mean: float, sd: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def make_report(
    title: str, runs: Sequence[Finished], pairs: Sequence[Pair], timings: dict[str, Timing] | None = None
) -> StudyReport:
    """Put a report of finished runs together; `pairs` and `timings` are by the names of points.

    Raises:
        ConfigError: two points have no seed, or not the same held-out documents.
    """
    by_point: dict[str, list[Finished]] = {}
    for run in runs:
        by_point.setdefault(run.point.name, []).append(run)
    losses = {point: {run.seed: run.measured.losses for run in finished} for point, finished in by_point.items()}
    rows = [_row(point, finished, (timings or {}).get(point)) for point, finished in by_point.items()]
    return StudyReport(
        title,
        rows,
        differences(losses, pairs),
        _agreement(by_point),
        {point: [run.measured.curve for run in finished] for point, finished in by_point.items()},
        {point: [run.measured.share_curve for run in finished] for point, finished in by_point.items()},
        {f"{run.point.name}, seed {run.seed}": str(run.folder) for run in runs},
    )


def _agreement(by_point: Mapping[str, Sequence[Finished]]) -> list[Agreed]:
    """Of every two points that route the same layers of the same text, by seed."""
    agreed = []
    for (first, ours), (second, theirs) in combinations(by_point.items(), 2):
        others = {run.seed: run.measured for run in theirs}
        overlaps = [
            Overlap.of(routed, others[run.seed].routed[layer])
            for run in ours
            if run.seed in others and run.measured.targets == others[run.seed].targets
            for layer, routed in run.measured.routed.items()
            if layer in others[run.seed].routed
        ]
        if overlaps:
            kappas = [overlap.kappa for overlap in overlaps if overlap.kappa is not None]
            kappa = statistics.fmean(kappas) if kappas else None
            agreed.append(Agreed(first, second, kappa, sum(overlaps, Overlap()).jaccard))
    return agreed


def _row(point: str, runs: list[Finished], timing: Timing | None) -> Row:
    losses = [run.measured.loss for run in runs]
    correct = [run.measured.accuracy for run in runs]
    shares = [run.measured.routed_share for run in runs if run.measured.routed_share is not None]
    return Row(
        point,
        len(runs),
        statistics.fmean(losses),
        statistics.stdev(losses) if len(losses) > 1 else None,
        statistics.fmean(correct),
        statistics.stdev(correct) if len(correct) > 1 else None,
        statistics.fmean(shares) if shares else None,
        statistics.fmean(run.measured.flops / run.measured.dense_flops for run in runs),
        timing,
    )
