"""Sums over texts, in memory that does not grow with them: by layer, and by token class, position and loss.

Notable choices:

- Sink tokens are routed whatever they are, so they are counted in a layer's share and in nothing else here.
- A standard error stands next to every mean over a group. It treats tokens as independent, which tokens of one text
  are not: read it as the least uncertainty there is.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtfcli.inspection.agreement import Agreement
from dtfcli.inspection.oracle import OracleRouting
from dtfcli.inspection.scores import Floats, LayerRouting
from dtfcli.inspection.text import TextRouting
from dtfcli.inspection.token_classes import CLASSES
from dtfcli.shares import POSITION_NAMES, POSITION_STARTS

LOSSES = (("below 0.1", 0.0), ("0.1-1", 0.1), ("1-3", 1.0), ("3-6", 3.0), ("6 and more", 6.0))
"""Buckets of a token's loss in nats, each with its smallest."""
POSITIONS = ("0", *POSITION_NAMES)
GROUPINGS = {
    "class": CLASSES,
    "position": POSITIONS,
    "loss": tuple(name for name, _ in LOSSES),
}
"""Ways of grouping tokens, each with its groups in order."""
Sums = Floats


@dataclass(frozen=True)
class GroupRow:
    """The tokens of one group, sinks left out.

    Attributes:
        routed_share, routed_error: mean share of the routed layers that they entered, and its standard error (None for
            a single token).
        loss: mean loss, nats, of the tokens that have one.
    """

    name: str
    tokens: int
    routed_share: float
    routed_error: float | None
    loss: float | None


@dataclass(frozen=True)
class LayerSummary:
    """One routed layer.

    Attributes:
        routed_share: routed tokens over all tokens, sinks among them.
        threshold, shown_threshold: as in `LayerRouting`.
        means, routed_means, skipping_means: of each figure over tokens that are not sinks: all, routed, skipping ones.
        criteria: of a score by surprise; empty for others. "by CE": of the routed tokens that are not sinks, the share
            whose score owes its larger part to the expected change, None if no token is routed. "rank CE": the share
            of the score's variance that comes with its CE part, Cov(softplus(a), score) over Var(score); a part that
            is large but the same for all tokens decides nothing.
    """

    layer: int
    routed_share: float
    threshold: float | None
    shown_threshold: float | None
    means: dict[str, float]
    routed_means: dict[str, float]
    skipping_means: dict[str, float]
    criteria: dict[str, float | None]


@dataclass(frozen=True)
class Summary:
    """Sums over texts.

    Attributes:
        texts, windows, tokens, sinks: how much; a text longer than the model's positions has several windows.
        routed_share: over all tokens and routed layers.
        loss: mean over tokens that have one, nats.
        layers: one for each routed layer.
        groups: by the names of `GROUPINGS`, if they have tokens.
        criteria: "by CE" as in `LayerSummary`, over all layers.
        agreement: of the causal mode and `topk`; None if one of them is not available.
        oracle: the router against the oracle; None: it was not measured.
    """

    texts: int
    windows: int
    tokens: int
    sinks: int
    routed_share: float
    loss: float | None
    layers: list[LayerSummary]
    groups: dict[str, list[GroupRow]]
    criteria: dict[str, float | None]
    agreement: Agreement | None
    oracle: OracleRouting | None

    def to_dict(self) -> dict[str, Any]:
        """The parts of the JSON document that are sums: "summary", "agreement" and, if there is one, "oracle"."""
        document = {
            "summary": asdict(replace(self, agreement=None, oracle=None)),
            "agreement": None if self.agreement is None else self.agreement.to_dict(),
        }
        return document if self.oracle is None else document | {"oracle": self.oracle.to_dict()}


@dataclass
class _Layer:
    """Sums over the tokens of one layer."""

    threshold: float | None
    shown_threshold: float | None
    tokens: int = 0
    routed: int = 0
    counted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, dtype=np.int64))  # skipping, routed
    sums: dict[str, NDArray[np.float64]] = field(default_factory=lambda: defaultdict(lambda: np.zeros(2)))  # likewise
    choices: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, dtype=np.int64))  # by CE, all
    moments: Sums = field(default_factory=lambda: np.zeros(5))  # count, score, CE part, score², score · CE part


class RoutingStatistics:
    """Adds up any number of texts of one model."""

    def __init__(self) -> None:
        self._texts = self._windows = self._tokens = self._sinks = 0
        self._layers: dict[int, _Layer] = {}
        self._groups: dict[str, dict[str, Sums]] = defaultdict(lambda: defaultdict(lambda: np.zeros(5)))
        self._agreement: Agreement | None = None
        self._oracle: OracleRouting | None = None

    def add(self, report: TextRouting) -> None:
        """Count one text."""
        counted = ~report.sinks
        positions = np.searchsorted(POSITION_STARTS, report.positions, side="right")
        self._texts += 1
        self._windows += len(report.windows)
        self._tokens += len(report.source)
        self._sinks += int(report.sinks.sum())
        for layer in report.layers:
            self._add_layer(layer, counted)
        sums = _token_sums(report)[counted]
        with_loss = ~np.isnan(report.loss[counted])
        bucket = np.searchsorted([least for _, least in LOSSES], report.loss[counted][with_loss], side="right") - 1
        _add_up(self._groups["class"], np.array(report.classes)[counted], sums)
        _add_up(self._groups["position"], np.array(POSITIONS)[positions][counted], sums)
        _add_up(self._groups["loss"], np.array(GROUPINGS["loss"])[bucket], sums[with_loss])
        if report.agreement is not None:
            self._agreement = report.agreement + self._agreement if self._agreement else report.agreement
        if report.oracle is not None:
            self._oracle = self._oracle + report.oracle if self._oracle else report.oracle

    def _add_layer(self, layer: LayerRouting, counted: NDArray[np.bool_]) -> None:
        total = self._layers.setdefault(layer.layer, _Layer(layer.threshold, layer.shown_threshold))
        total.tokens += len(counted)
        total.routed += int(layer.selected.sum())
        routed, skipping = counted & layer.selected, counted & ~layer.selected
        total.counted += [int(skipping.sum()), int(routed.sum())]
        for name, values in layer.measures().items():
            total.sums[name] += [values[skipping].sum(), values[routed].sum()]
        if "ce_part" in layer.figures:
            part, score = layer.figures["ce_part"][counted], layer.score[counted]
            chosen = part[layer.selected[counted]]
            total.choices += [int((chosen > 0.5).sum()), len(chosen)]
            expected = part * score
            sums = (len(score), score.sum(), expected.sum(), (score * score).sum(), (score * expected).sum())
            total.moments += sums

    def result(self) -> Summary:
        """The figures up to now, at least of one text."""
        assert self._tokens, "no text was added"
        choices = sum((layer.choices for layer in self._layers.values()), np.zeros(2, dtype=np.int64))
        routed = sum(layer.routed for layer in self._layers.values())
        losses, tokens = sum(self._groups["class"].values(), np.zeros(5))[3:]
        return Summary(
            texts=self._texts,
            windows=self._windows,
            tokens=self._tokens,
            sinks=self._sinks,
            routed_share=routed / (self._tokens * len(self._layers)),
            loss=float(losses / tokens) if tokens else None,
            layers=[_layer_summary(index, layer) for index, layer in self._layers.items()],
            groups={
                grouping: [_row(name, sums[name]) for name in names if name in sums]
                for grouping, names in GROUPINGS.items()
                if (sums := self._groups.get(grouping))
            },
            criteria={"by CE": float(choices[0] / choices[1])} if choices[1] else {},
            agreement=self._agreement,
            oracle=self._oracle,
        )


def summarize(report: TextRouting) -> Summary:
    """The figures of a single text."""
    statistics = RoutingStatistics()
    statistics.add(report)
    return statistics.result()


def _add_up(totals: dict[Any, Sums], keys: NDArray[Any], sums: Sums) -> None:
    """Add the rows of `sums`, [T, 5], to the totals of their keys, [T]."""
    names, place = np.unique(keys, return_inverse=True)
    added = np.zeros((len(names), sums.shape[1]))
    np.add.at(added, place, sums)
    for name, row in zip(names.tolist(), added, strict=True):
        totals[name] += row


def _token_sums(report: TextRouting) -> Sums:
    """[T, 5], which groups add up: one, share, share², loss, whether there is a loss."""
    share, has_loss = report.depth_share, ~np.isnan(report.loss)
    return np.stack([np.ones(len(share)), share, share**2, np.where(has_loss, report.loss, 0.0), has_loss], axis=1)


def _row(name: str, sums: Sums) -> GroupRow:
    tokens, share, squares, loss, with_loss = sums.tolist()
    error = _standard_error(tokens, share, squares)
    return GroupRow(name, int(tokens), share / tokens, error, loss / with_loss if with_loss else None)


def _standard_error(count: float, total: float, squares: float) -> float | None:
    if count < 2:
        return None
    variance = max(0.0, squares - total * total / count) / (count - 1)
    return float((variance / count) ** 0.5)


def _layer_summary(index: int, layer: _Layer) -> LayerSummary:
    skipping, routed = layer.counted.tolist()
    sums = {name: values.tolist() for name, values in layer.sums.items()}
    return LayerSummary(
        layer=index,
        routed_share=layer.routed / layer.tokens,
        threshold=layer.threshold,
        shown_threshold=layer.shown_threshold,
        means={name: sum(pair) / (skipping + routed) for name, pair in sums.items() if skipping + routed},
        routed_means={name: total / routed for name, (_, total) in sums.items() if routed},
        skipping_means={name: total / skipping for name, (total, _) in sums.items() if skipping},
        criteria=_criteria(layer) if "ce_part" in layer.sums else {},
    )


def _criteria(layer: _Layer) -> dict[str, float | None]:
    count, score, part, squares, products = layer.moments.tolist()
    variance, covariance = squares - score * score / count, products - score * part / count
    varies = variance > 1e-12 * squares  # more than rounding
    by_ce = float(layer.choices[0] / layer.choices[1]) if layer.choices[1] else None
    return {"by CE": by_ce, "rank CE": covariance / variance if varies else None}
