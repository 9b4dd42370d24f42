"""A router against an oracle, which takes the tokens that lose most by skipping a layer.

A token loses ‖y − z‖ by skipping, the *true cost*: y is the layer's output when every token enters, and z the token
with its forecast, or as it was. The oracle knows y before it chooses, so no model can route by it; it takes as many
tokens of each text and layer as the router does. The loss that the oracle saves is the most that a better router of
this model could save, as far as routers go by this cost.

Three things are measured. *Forecasts*: which part of a token's update its forecast misses. *Agreement*, along the
router's own pass: how far its scores rank tokens as their costs do (Spearman's ρ), and how far its choice is the
oracle's. *Loss*: of the same text while the oracle, a random choice, or nobody chooses in all layers.
"""

import math
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtfcli.inspection.agreement import Overlap
from dtfcli.inspection.losses import next_token_losses
from dtfcli.models.context import RoutingContext
from dtfcli.statistics import Difference, TextLosses

CHOOSERS = ("router", "oracle", "random", "every token")
"""Who may choose the tokens of a pass."""


@dataclass(frozen=True)
class OracleLayer:
    """One routed layer along the router's own pass; sinks, which nobody chooses, are left out.

    Attributes:
        overlap: of the router's tokens with the oracle's.
        weighted_correlation, weight: ρ of scores and costs within each window, times its tokens; and those tokens.
            Windows in which one of the two does not vary are left out.
        missed: ‖Δ − f‖² / ‖Δ‖² of forecast f and update Δ, summed over the tokens that skip, and over the tokens that
            enter; NaN without forecasts.
    """

    overlap: Overlap
    weighted_correlation: float
    weight: int
    missed: tuple[float, float]

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's ρ, mean over windows by their tokens; None if it is not defined."""
        return _mean(self.weighted_correlation, self.weight)

    @property
    def missed_shares(self) -> tuple[float | None, float | None]:
        """Mean share of the update that a forecast misses, of tokens that skip and of tokens that enter."""
        return _mean(self.missed[0], self.skipping), _mean(self.missed[1], self.overlap.tokens - self.skipping)

    @property
    def skipping(self) -> int:
        """Tokens that the router left out."""
        return self.overlap.second_only + self.overlap.neither

    def __add__(self, other: "OracleLayer") -> "OracleLayer":
        return OracleLayer(
            self.overlap + other.overlap,
            self.weighted_correlation + other.weighted_correlation,
            self.weight + other.weight,
            (self.missed[0] + other.missed[0], self.missed[1] + other.missed[1]),
        )


def _mean(total: float, count: int) -> float | None:
    return None if math.isnan(total) or not count else total / count


@dataclass(frozen=True)
class OracleRouting:
    """A router against the oracle, over any number of texts.

    Attributes:
        layers: by layer index.
        losses: by who chose (`CHOOSERS`), of each text.
    """

    layers: dict[int, OracleLayer]
    losses: dict[str, TextLosses]

    def __add__(self, other: "OracleRouting") -> "OracleRouting":
        layers = {index: layer + other.layers[index] for index, layer in self.layers.items()}
        losses = {chooser: each + other.losses[chooser] for chooser, each in self.losses.items()}
        return OracleRouting(layers, losses)

    @property
    def missed(self) -> float | None:
        """Mean share of the update that the forecasts of skipping tokens miss, over all layers."""
        layers = self.layers.values()
        return _mean(sum(layer.missed[0] for layer in layers), sum(layer.skipping for layer in layers))

    def difference(self, chooser: str) -> Difference:
        """Loss of `chooser` minus the router's, nats per token."""
        return self.losses[chooser].minus(self.losses[CHOOSERS[0]])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layers": [
                {
                    "layer": index,
                    "rank_correlation": layer.rank_correlation,
                    "missed_skipping": layer.missed_shares[0],
                    "missed_routed": layer.missed_shares[1],
                }
                | layer.overlap.to_dict()
                for index, layer in self.layers.items()
            ],
            "loss": {name: losses.mean for name, losses in self.losses.items()},
            "difference": {name: (self.difference(name).value, self.difference(name).stderr) for name in CHOOSERS[1:]},
            "texts": len(self.losses[CHOOSERS[0]].targets),
        }


@torch.inference_mode()
def against_oracle(model: Any, windows: list[Tensor]) -> tuple[OracleRouting, dict[int, NDArray[np.float64]]]:
    """Measure a router on one text.

    Args:
        model: routes tokens, in eval mode and calibrated for its mode.
        windows: token ids [1, T] of each part that the model sees alone.

    Returns:
        The measurement; and by layer the true cost of each token, root mean square per element, float64 [T].
    """
    layers: dict[int, OracleLayer] = {}
    costs: dict[int, list[Tensor]] = defaultdict(list)
    nats, targets = dict.fromkeys(CHOOSERS, 0.0), 0
    for number, row in enumerate(windows):
        walk = _Walk(model, row, np.random.default_rng([number, zlib.crc32(row.cpu().numpy().tobytes())]))
        hidden = {"router": walk.along_router(layers, costs)}
        hidden |= {chooser: walk.chosen_by(chooser) for chooser in CHOOSERS[1:]}
        for chooser, states in hidden.items():
            nats[chooser] += float(np.nansum(next_token_losses(model, states[0], row[0])))
        targets += row.shape[1] - 1
    losses = {name: TextLosses(np.array([value]), np.array([targets])) for name, value in nats.items()}
    per_element = model.config.hidden_size**-0.5
    true_costs = {layer: per_element * torch.cat(rows).double().cpu().numpy() for layer, rows in costs.items()}
    return OracleRouting(layers, losses), true_costs


class _Walk:
    """Passes of one window [1, T] through the stack, layer by layer."""

    def __init__(self, model: Any, row: Tensor, random: np.random.Generator) -> None:
        self.stack, self.row, self.random = model.model, row, random
        self.counts: dict[int, int] = {}  # tokens that the router took, by layer

    def along_router(self, layers: dict[int, OracleLayer], costs: dict[int, list[Tensor]]) -> Tensor:
        """The router's own pass; adds the measurements of each layer. Returns hidden states [1, T, D]."""
        state = self._begin()
        for index in range(len(self.stack.layers)):
            measured = self._skipping(index, state) if index in self.stack.routed else None
            self.stack.run_layer(index, state)
            if measured is not None:
                cost, record = measured[0], state.records[-1]
                self.counts[index] = int(record.selected.sum())
                oracle = _largest(cost, self.counts[index], state.context)
                layer = _compare(record.scores[0], record.selected[0], measured, oracle, state.context)
                layers[index] = layers[index] + layer if index in layers else layer
                costs[index].append(cost)
        return self.stack.norm(state.hidden_states)

    def chosen_by(self, chooser: str) -> Tensor:
        """A pass in which another chooser takes as many tokens. Returns hidden states [1, T, D]."""
        state = self._begin()
        for index in range(len(self.stack.layers)):
            if index in self.stack.routed:
                chosen = self._choice(chooser, index, state)
                state.context = replace(state.context, chosen={index: chosen.unsqueeze(0)})
            self.stack.run_layer(index, state)
        return self.stack.norm(state.hidden_states)

    def _choice(self, chooser: str, index: int, state: Any) -> Tensor:
        """Bool [T]."""
        if chooser == "every token":
            state.context = replace(state.context, capacities={**state.context.capacities, index: 1.0})
            return torch.ones_like(self.row[0], dtype=torch.bool)
        if chooser == "random":
            cost = torch.from_numpy(self.random.random(self.row.shape[1], dtype=np.float32)).to(self.row.device)
        else:
            cost, _ = self._skipping(index, state)
        return _largest(cost, self.counts[index], state.context)

    def _begin(self) -> Any:
        return self.stack.prepare(self.stack.embed_tokens(self.row))

    def _skipping(self, index: int, state: Any) -> tuple[Tensor, Tensor]:
        """What each token loses by skipping the layer; the pass stays at the layer.

        Returns:
            ‖y − z‖, and ‖Δ − f‖² / ‖Δ‖² (NaN without forecasts); float32 [T] each.
        """
        outputs = []
        for everyone in (True, False):
            chosen = {index: torch.full_like(self.row, everyone, dtype=torch.bool)}
            capacities = {**state.context.capacities, index: 1.0 if everyone else 0.5}
            context = replace(state.context, capacities=capacities, chosen=chosen, shows_updates=everyone)
            outputs.append(self.stack.route(index, state, context))
        (with_layer, record), (without_layer, _) = outputs
        cost = (with_layer - without_layer)[0].float().norm(dim=-1)
        if self.stack.config.bypass != "forecast":
            return cost, torch.full_like(cost, torch.nan)
        error = (record.after - without_layer)[0].float().square().sum(-1)
        update = (record.after - record.before)[0].float().square().sum(-1)
        return cost, error / update.clamp(min=torch.finfo(torch.float32).tiny)


def _largest(cost: Tensor, count: int, context: RoutingContext) -> Tensor:
    """The sinks and the costliest other tokens, `count` together; bool [T]."""
    if context.sinks is not None:
        cost = cost.masked_fill(context.sinks[0], torch.inf)
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(0, cost.topk(count).indices, True)


def _compare(
    scores: Tensor, routed: Tensor, measured: tuple[Tensor, Tensor], oracle: Tensor, context: RoutingContext
) -> OracleLayer:
    from scipy import stats

    counted = slice(None) if context.sinks is None else ~context.sinks[0].cpu().numpy()
    tensors = (scores, *measured, routed, oracle)
    ranked, costs, missed, ours, theirs = (tensor.cpu().numpy()[counted] for tensor in tensors)
    varies = len(ranked) > 2 and np.ptp(ranked) > 0 and np.ptp(costs) > 0
    correlation = float(stats.spearmanr(ranked, costs).statistic) if varies else 0.0
    return OracleLayer(
        overlap=Overlap.of(ours, theirs),
        weighted_correlation=correlation * len(ranked),
        weight=len(ranked) if varies else 0,
        missed=(float(missed[~ours].sum()), float(missed[ours].sum())),
    )
