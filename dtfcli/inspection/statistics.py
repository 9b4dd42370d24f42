"""Sums over texts, in memory that does not grow with them: by layer, position, token class and frequency.

Notable choices:

- Sink tokens are routed whatever they are, so they are counted in a layer's share and in nothing else here.
- A standard error stands next to every mean over a group. It treats tokens as independent, which tokens of one text
  are not: read it as the least uncertainty there is.
- A token's frequency is that in all texts together, so it is known at the end. Until then each different token has a
  row of sums, at most a vocabulary of them.
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

FREQUENCIES = (("once", 1), ("2-3", 2), ("4-9", 4), ("10-99", 10), ("100+", 100))
"""Buckets of how often a token occurs, each with its smallest count."""
LOSSES = (("below 0.1", 0.0), ("0.1-1", 0.1), ("1-3", 1.0), ("3-6", 3.0), ("6 and more", 6.0))
"""Buckets of a token's loss in nats, each with its smallest."""
POSITIONS = ("0", *POSITION_NAMES)
GROUPINGS = {
    "class": CLASSES,
    "frequency": tuple(name for name, _ in FREQUENCIES),
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
        leading, leading_error: mean of the leading figure (`scores.Reading`) over tokens and routed layers, and its
            standard error; None without such a figure.
        loss: mean loss, nats, of the tokens that have one.
    """

    name: str
    tokens: int
    routed_share: float
    routed_error: float | None
    leading: float | None
    leading_error: float | None
    loss: float | None


@dataclass(frozen=True)
class LayerSummary:
    """One routed layer.

    Attributes:
        routed_share: routed tokens over all tokens, sinks among them.
        threshold, shown_threshold: as in `LayerRouting`.
        means, routed_means, skipping_means: of each figure over tokens that are not sinks: all, routed, skipping ones.
        positions: tokens and routed share by `POSITIONS`.
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
    positions: dict[str, dict[str, float]]
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
        depth_with_loss, depth_with_next_loss: Pearson's r of a token's depth with its own loss, and with the loss of
            the token after it, which it helps to predict; None if one of them does not vary.
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
    depth_with_loss: float | None
    depth_with_next_loss: float | None
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
    positions: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(POSITIONS), 2)))
    choices: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, dtype=np.int64))  # by CE, all
    moments: Sums = field(default_factory=lambda: np.zeros(6))  # of score and CE part


class RoutingStatistics:
    """Adds up any number of texts of one model."""

    def __init__(self) -> None:
        self._texts = self._windows = self._tokens = self._sinks = 0
        self._leading: str | None = None
        self._layers: dict[int, _Layer] = {}
        self._groups: dict[str, dict[str, Sums]] = defaultdict(lambda: defaultdict(lambda: np.zeros(7)))
        self._by_id: dict[int, Sums] = defaultdict(lambda: np.zeros(7))
        self._own_loss, self._next_loss = np.zeros(6), np.zeros(6)
        self._agreement: Agreement | None = None
        self._oracle: OracleRouting | None = None

    def add(self, report: TextRouting) -> None:
        """Count one text."""
        counted = ~report.sinks
        positions = np.searchsorted(POSITION_STARTS, report.positions, side="right")
        self._texts += 1
        self._leading = report.reading.leading
        self._windows += len(report.windows)
        self._tokens += len(report.source)
        self._sinks += int(report.sinks.sum())
        for layer in report.layers:
            self._add_layer(layer, counted, positions)
        sums = _token_sums(report)[counted]
        with_loss = ~np.isnan(report.loss[counted])
        bucket = np.searchsorted([least for _, least in LOSSES], report.loss[counted][with_loss], side="right") - 1
        _add_up(self._groups["class"], np.array(report.classes)[counted], sums)
        _add_up(self._groups["position"], np.array(POSITIONS)[positions][counted], sums)
        _add_up(self._groups["loss"], np.array(GROUPINGS["loss"])[bucket], sums[with_loss])
        _add_up(self._by_id, np.array(report.source.ids)[counted], sums)
        self._add_correlations(report, counted)
        if report.agreement is not None:
            self._agreement = report.agreement + self._agreement if self._agreement else report.agreement
        if report.oracle is not None:
            self._oracle = self._oracle + report.oracle if self._oracle else report.oracle

    def _add_layer(self, layer: LayerRouting, counted: NDArray[np.bool_], positions: NDArray[np.int64]) -> None:
        total = self._layers.setdefault(layer.layer, _Layer(layer.threshold, layer.shown_threshold))
        total.tokens += len(counted)
        total.routed += int(layer.selected.sum())
        routed, skipping = counted & layer.selected, counted & ~layer.selected
        total.counted += [int(skipping.sum()), int(routed.sum())]
        for name, values in layer.measures().items():
            total.sums[name] += [values[skipping].sum(), values[routed].sum()]
        columns = np.stack([np.ones(len(counted)), layer.selected], axis=1)
        np.add.at(total.positions, positions[counted], columns[counted])
        if "ce_part" in layer.figures:
            part, score = layer.figures["ce_part"][counted], layer.score[counted]
            chosen = part[layer.selected[counted]]
            total.choices += [int((chosen > 0.5).sum()), len(chosen)]
            total.moments += _moments(score, part * score)

    def _add_correlations(self, report: TextRouting, counted: NDArray[np.bool_]) -> None:
        depth = report.depth_share
        paired = counted & ~np.isnan(report.loss)
        self._own_loss += _moments(depth[paired], report.loss[paired])
        # The first token of a window has no loss, so none reaches over a window's edge.
        following = np.append(report.loss[1:], np.nan)
        paired = counted & ~np.isnan(following)
        self._next_loss += _moments(depth[paired], following[paired])

    def result(self) -> Summary:
        """The figures up to now, at least of one text."""
        assert self._tokens, "no text was added"
        frequencies: dict[str, Sums] = defaultdict(lambda: np.zeros(7))
        for total in self._by_id.values():
            frequencies[next(name for name, least in reversed(FREQUENCIES) if total[0] >= least)] += total
        groups = {**self._groups, "frequency": frequencies}
        leads = any(self._leading in layer.sums for layer in self._layers.values())
        choices = sum((layer.choices for layer in self._layers.values()), np.zeros(2, dtype=np.int64))
        routed = sum(layer.routed for layer in self._layers.values())
        tokens, losses = self._own_loss[0], self._own_loss[2]
        return Summary(
            texts=self._texts,
            windows=self._windows,
            tokens=self._tokens,
            sinks=self._sinks,
            routed_share=routed / (self._tokens * len(self._layers)),
            loss=float(losses / tokens) if tokens else None,
            layers=[_layer_summary(index, layer) for index, layer in self._layers.items()],
            groups={
                grouping: [_row(name, sums[name], leads) for name in names if name in sums]
                for grouping, names in GROUPINGS.items()
                if (sums := groups.get(grouping))
            },
            criteria={"by CE": float(choices[0] / choices[1])} if choices[1] else {},
            depth_with_loss=_pearson(self._own_loss),
            depth_with_next_loss=_pearson(self._next_loss),
            agreement=self._agreement,
            oracle=self._oracle,
        )


def summarize(report: TextRouting) -> Summary:
    """The figures of a single text."""
    statistics = RoutingStatistics()
    statistics.add(report)
    return statistics.result()


def _add_up(totals: dict[Any, Sums], keys: NDArray[Any], sums: Sums) -> None:
    """Add the rows of `sums`, [T, 7], to the totals of their keys, [T]."""
    names, place = np.unique(keys, return_inverse=True)
    added = np.zeros((len(names), sums.shape[1]))
    np.add.at(added, place, sums)
    for name, row in zip(names.tolist(), added, strict=True):
        totals[name] += row


def _token_sums(report: TextRouting) -> Sums:
    """[T, 7], which groups add up: one, share, share², leading figure, its square, loss, whether there is a loss."""
    share, name = report.depth_share, report.reading.leading
    leading = np.zeros(len(share))
    if name is not None and name in report.layers[0].figures:
        leading = np.mean([layer.figures[name] for layer in report.layers], axis=0)
    has_loss = ~np.isnan(report.loss)
    loss = np.where(has_loss, report.loss, 0.0)
    return np.stack([np.ones(len(share)), share, share**2, leading, leading**2, loss, has_loss], axis=1)


def _row(name: str, sums: Sums, leads: bool) -> GroupRow:
    tokens, share, share_squares, leading, leading_squares, loss, with_loss = sums.tolist()
    return GroupRow(
        name=name,
        tokens=int(tokens),
        routed_share=share / tokens,
        routed_error=_standard_error(tokens, share, share_squares),
        leading=leading / tokens if leads else None,
        leading_error=_standard_error(tokens, leading, leading_squares) if leads else None,
        loss=loss / with_loss if with_loss else None,
    )


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
        positions={
            name: {"tokens": tokens, "routed_share": entered / tokens}
            for name, (tokens, entered) in zip(POSITIONS, layer.positions.tolist(), strict=True)
            if tokens
        },
        criteria=_criteria(layer) if "ce_part" in layer.sums else {},
    )


def _criteria(layer: _Layer) -> dict[str, float | None]:
    variance, _, covariance = _variances(layer.moments)
    by_ce = float(layer.choices[0] / layer.choices[1]) if layer.choices[1] else None
    return {"by CE": by_ce, "rank CE": covariance / variance if variance else None}


def _moments(x: Floats, y: Floats) -> Sums:
    return np.array([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])


def _variances(moments: Sums) -> tuple[float, float, float]:
    """Sums of squares of x and of y around their means, 0 if only rounding is left of them, and of their product."""
    count, x, y, xx, yy, xy = moments.tolist()
    count = max(1.0, count)
    squares = (
        around if (around := total - mean * mean / count) > 1e-12 * max(1.0, total) else 0.0
        for mean, total in ((x, xx), (y, yy))
    )
    return *squares, xy - x * y / count


def _pearson(moments: Sums) -> float | None:
    x, y, product = _variances(moments)
    return product / (x * y) ** 0.5 if moments[0] > 2 and x and y else None
