"""Sums over texts, in memory that does not grow with them: by layer, position, token class and frequency.

Notable choices:

- Sink tokens are routed whatever they are, so they are counted in a layer's share and in nothing else here.
- A standard error stands next to every mean over a group. It treats tokens as independent, which tokens of one text
  are not: read it as the least uncertainty there is.
- Frequencies are taken over everything that was added, so they are known at the end. Until then each different token
  has a row of sums, at most a vocabulary of them.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtfcli.inspection.agreement import Agreement
from dtfcli.inspection.oracle import OracleRouting
from dtfcli.inspection.text import MEASURES, TextRouting
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
"""Ways of telling tokens apart, each with its groups in the order of reading."""


@dataclass(frozen=True)
class GroupRow:
    """The tokens of one group.

    Attributes:
        name: of the group.
        tokens: how many, sinks left out.
        depth, depth_error: mean number of routed layers entered, and its standard error (None for a single token).
        routed_share, routed_error: the same over the number of routed layers.
        static_surprise, static_error: mean D_st over tokens and routed layers (DTF), and its standard error.
        loss: mean loss, nats, of those that have one.
    """

    name: str
    tokens: int
    depth: float
    depth_error: float | None
    routed_share: float
    routed_error: float | None
    static_surprise: float | None
    static_error: float | None
    loss: float | None


@dataclass(frozen=True)
class LayerSummary:
    """One routed layer.

    Attributes:
        layer: index in the stack.
        routed_share: routed tokens over all tokens, sinks among them.
        threshold: of the layer, in a mode that has one.
        means: of each measure over tokens that are not sinks.
        driven_by_ce: of the routed tokens that are not sinks, the share whose score the expected change contributed the
            larger part to (DTF); None when there are none.
        ranking_by_ce: the share of the score's variance that comes with its CE part, Cov(softplus(a), score) over
            Var(score) (DTF): a part that is large but the same for all tokens decides nothing.
        positions: routed share, mean gate and mean D_st by `POSITIONS`.
    """

    layer: int
    routed_share: float
    threshold: float | None
    means: dict[str, float]
    driven_by_ce: float | None
    ranking_by_ce: float | None
    positions: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Summary:
    """What was added up.

    Attributes:
        texts, windows, tokens, sinks: how much; a text longer than the model's positions has several windows.
        routed_share: over all tokens and routed layers.
        loss: mean over tokens that have one, nats.
        layers: one for each routed layer.
        groups: by the names of `GROUPINGS`, those that have tokens.
        driven_by_ce: as in `LayerSummary`, over all layers.
        depth_with_loss, depth_with_next_loss: Pearson's r of a token's depth with its own loss, and with the loss of
            the token after it, which it helps to predict; None where one of them does not vary.
        agreement: of the causal mode and `topk`; None unless every text has it.
        oracle: the router against the oracle, over the texts that have it; None: no text has.
    """

    texts: int
    windows: int
    tokens: int
    sinks: int
    routed_share: float
    loss: float | None
    layers: list[LayerSummary]
    groups: dict[str, list[GroupRow]]
    driven_by_ce: float | None
    depth_with_loss: float | None
    depth_with_next_loss: float | None
    agreement: Agreement | None
    oracle: OracleRouting | None

    def to_dict(self) -> dict[str, Any]:
        """The parts of the JSON document that are sums: "summary", "agreement" and, where there is one, "oracle"."""
        document = {
            "summary": replace(self, agreement=None, oracle=None),
            "agreement": None if self.agreement is None else self.agreement.to_dict(),
        }
        return document if self.oracle is None else document | {"oracle": self.oracle.to_dict()}


@dataclass
class _Layer:
    """Sums over the tokens of one layer."""

    threshold: float | None
    tokens: int = 0
    routed: int = 0
    counted: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    choices: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, dtype=np.int64))
    score_moments: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))
    positions: NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(POSITIONS), 4)))


class RoutingStatistics:
    """Adds up any number of texts of one model."""

    def __init__(self) -> None:
        self._texts = self._windows = self._tokens = self._sinks = 0
        self._layers: dict[int, _Layer] = {}
        self._groups: dict[str, dict[str, NDArray[np.float64]]] = defaultdict(dict)
        self._by_id: dict[int, NDArray[np.float64]] = {}
        self._own_loss, self._next_loss = np.zeros(6), np.zeros(6)
        self._agreement: Agreement | None = None
        self._agreed_texts = 0
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
            self._add_layer(layer, counted, positions)
        sums = _token_sums(report)[counted]
        groupings = {"class": np.array(report.classes), "position": np.array(POSITIONS)[positions]}
        for grouping, names in groupings.items():
            self._add_groups(grouping, names[counted], sums)
        known = counted & ~np.isnan(report.loss)
        bucket = np.searchsorted([least for _, least in LOSSES], report.loss[known], side="right") - 1
        self._add_groups("loss", np.array(GROUPINGS["loss"])[bucket], sums[known[counted]])
        ids, place = np.unique(np.array(report.source.ids)[counted], return_inverse=True)
        totals = np.zeros((len(ids), sums.shape[1]))
        np.add.at(totals, place, sums)
        for token, total in zip(ids.tolist(), totals, strict=True):
            self._by_id[token] = self._by_id[token] + total if token in self._by_id else total
        self._add_correlations(report, counted)
        if report.agreement is not None:
            before = self._agreement
            self._agreement = report.agreement if before is None else before + report.agreement
            self._agreed_texts += 1
        if report.oracle is not None:
            self._oracle = report.oracle if self._oracle is None else self._oracle + report.oracle

    def _add_layer(self, layer: Any, counted: NDArray[np.bool_], positions: NDArray[np.int64]) -> None:
        total = self._layers.setdefault(layer.layer, _Layer(layer.threshold))
        total.tokens += len(counted)
        total.routed += int(layer.selected.sum())
        total.counted += int(counted.sum())
        for name, values in layer.measures().items():
            total.sums[name] += float(values[counted].sum())
        static = np.zeros(len(counted)) if layer.static_surprise is None else layer.static_surprise
        columns = np.stack([np.ones(len(counted)), layer.selected, layer.gate, static], axis=1)
        np.add.at(total.positions, positions[counted], columns[counted])
        if layer.ce_part is not None:
            part, score = layer.ce_part[counted], layer.score[counted]
            chosen = part[layer.selected[counted]]
            total.choices += [int((chosen > 0.5).sum()), len(chosen)]
            ce = part * score
            total.score_moments += [len(score), ce.sum(), score.sum(), (ce * score).sum(), (score * score).sum()]

    def _add_groups(self, grouping: str, names: NDArray[Any], sums: NDArray[np.float64]) -> None:
        groups = self._groups[grouping]
        for name in np.unique(names):
            total = sums[names == name].sum(0)
            groups[str(name)] = groups[str(name)] + total if str(name) in groups else total

    def _add_correlations(self, report: TextRouting, counted: NDArray[np.bool_]) -> None:
        depth = report.depth_share
        known = counted & ~np.isnan(report.loss)
        self._own_loss += _moments(depth[known], report.loss[known])
        # The first token of a window has no loss, so none reaches over a window's edge.
        following = np.append(report.loss[1:], np.nan)
        known = counted & ~np.isnan(following)
        self._next_loss += _moments(depth[known], following[known])

    def result(self) -> Summary:
        """The figures up to now.

        Raises:
            ValueError: nothing was added.
        """
        if not self._tokens:
            raise ValueError("no text was added")
        count = max(1, len(self._layers))
        groups = dict(self._groups)
        if self._by_id:
            frequencies: dict[str, NDArray[np.float64]] = {}
            for total in self._by_id.values():
                name = next(name for name, least in reversed(FREQUENCIES) if total[0] >= least)
                frequencies[name] = frequencies[name] + total if name in frequencies else total
            groups["frequency"] = frequencies
        dtf = any(layer.choices[1] or "ce_part" in layer.sums for layer in self._layers.values())
        choices = sum((layer.choices for layer in self._layers.values()), np.zeros(2, dtype=np.int64))
        routed = sum(layer.routed for layer in self._layers.values())
        tokens, losses = self._own_loss[0], self._own_loss[2]
        return Summary(
            texts=self._texts,
            windows=self._windows,
            tokens=self._tokens,
            sinks=self._sinks,
            routed_share=routed / (self._tokens * count) if self._layers else 1.0,
            loss=float(losses / tokens) if tokens else None,
            layers=[_layer_summary(index, layer) for index, layer in self._layers.items()],
            groups={
                grouping: [_row(name, found[name], count, dtf) for name in GROUPINGS[grouping] if name in found]
                for grouping in GROUPINGS
                if (found := groups.get(grouping))
            },
            driven_by_ce=float(choices[0] / choices[1]) if choices[1] else None,
            depth_with_loss=_pearson(self._own_loss),
            depth_with_next_loss=_pearson(self._next_loss),
            agreement=self._agreement if self._agreed_texts == self._texts else None,
            oracle=self._oracle,
        )


def summarize(report: TextRouting) -> Summary:
    """The figures of a single text."""
    statistics = RoutingStatistics()
    statistics.add(report)
    return statistics.result()


def _token_sums(report: TextRouting) -> NDArray[np.float64]:
    """[T, 7]: one, depth, depth², mean D_st, its square, loss, whether there is a loss; what groups add up."""
    depth = np.array(report.depth, dtype=np.float64)
    static = np.zeros(len(depth))
    if report.layers and report.layers[0].static_surprise is not None:
        static = np.mean(np.stack([layer.measures()["static_surprise"] for layer in report.layers]), axis=0)
    known = ~np.isnan(report.loss)
    loss = np.where(known, report.loss, 0.0)
    return np.stack([np.ones(len(depth)), depth, depth**2, static, static**2, loss, known], axis=1)


def _row(name: str, sums: NDArray[np.float64], layers: int, dtf: bool) -> GroupRow:
    tokens, depth, depth_squared, static, static_squared, loss, with_loss = sums.tolist()
    error = _standard_error(tokens, depth, depth_squared)
    return GroupRow(
        name=name,
        tokens=int(tokens),
        depth=depth / tokens,
        depth_error=error,
        routed_share=depth / tokens / layers,
        routed_error=None if error is None else error / layers,
        static_surprise=static / tokens if dtf else None,
        static_error=_standard_error(tokens, static, static_squared) if dtf else None,
        loss=loss / with_loss if with_loss else None,
    )


def _standard_error(count: float, total: float, squares: float) -> float | None:
    if count < 2:
        return None
    variance = max(0.0, squares - total * total / count) / (count - 1)
    return float((variance / count) ** 0.5)


def _layer_summary(index: int, layer: _Layer) -> LayerSummary:
    count, ce, score, product, squares = layer.score_moments.tolist()
    variance = squares - score * score / count if count else 0.0
    ranking = (product - ce * score / count) / variance if variance > 1e-12 * max(1.0, squares) else None
    dtf = "ce_part" in layer.sums
    positions: dict[str, dict[str, float | None]] = {}
    for name, (tokens, routed, gate, static) in zip(POSITIONS, layer.positions.tolist(), strict=True):
        if tokens:
            found = {"routed_share": routed / tokens, "gate": gate / tokens}
            positions[name] = {"tokens": tokens, **found, "static_surprise": static / tokens if dtf else None}
    return LayerSummary(
        layer=index,
        routed_share=layer.routed / layer.tokens,
        threshold=layer.threshold,
        means={name: layer.sums[name] / layer.counted for name in MEASURES if name in layer.sums and layer.counted},
        driven_by_ce=float(layer.choices[0] / layer.choices[1]) if layer.choices[1] else None,
        ranking_by_ce=ranking,
        positions=positions,
    )


def _moments(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])


def _pearson(moments: NDArray[np.float64]) -> float | None:
    count, x, y, xx, yy, xy = moments.tolist()
    if count < 3:
        return None
    var_x, var_y = xx - x * x / count, yy - y * y / count
    if var_x <= 1e-12 * max(1.0, xx) or var_y <= 1e-12 * max(1.0, yy):
        return None
    return float((xy - x * y / count) / (var_x * var_y) ** 0.5)
