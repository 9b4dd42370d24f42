"""A router against an oracle: the tokens whose update by a layer is largest, which skipping would lose.

The size of a token's update is ‖y − x‖, y what the layer makes of x when every token enters. The oracle looks at it
before it chooses, so no model can route by it; it takes as many tokens of each text and layer as the router does. What
the loss gains when the oracle chooses is left to win for any router of this model that goes by this size.

Two things are measured. *Agreement*: along the router's own pass, how far its scores rank tokens as their sizes do
(Spearman's ρ), and how far its choice is the oracle's. *Loss*: the same text once more, while the oracle chooses in all
layers; also while a random choice does, and when every token enters.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtfcli.inspection.agreement import Overlap
from dtfcli.inspection.losses import next_token_losses
from dtfcli.models.routers import RoutingFrame
from dtfcli.statistics import Difference, TextLosses

CHOOSERS = ("router", "oracle", "random", "every token")
"""Who may choose the tokens of a pass."""


@dataclass(frozen=True)
class OracleLayer:
    """One routed layer along the router's own pass; sinks, which nobody chooses, are left out.

    Attributes:
        overlap: of the router's tokens with the oracle's.
        weighted_correlation, weight: ρ of scores and sizes within each window, times its tokens; and those tokens.
            Windows in which one of the two does not vary are left out.
    """

    overlap: Overlap
    weighted_correlation: float
    weight: int

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's ρ, mean over windows by their tokens; None where it is not defined."""
        return self.weighted_correlation / self.weight if self.weight else None

    def __add__(self, other: "OracleLayer") -> "OracleLayer":
        return OracleLayer(
            self.overlap + other.overlap,
            self.weighted_correlation + other.weighted_correlation,
            self.weight + other.weight,
        )


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
        layers = {layer: own + other.layers[layer] for layer, own in self.layers.items()}
        return OracleRouting(layers, {chooser: own + other.losses[chooser] for chooser, own in self.losses.items()})

    def difference(self, chooser: str) -> Difference:
        """Loss of `chooser` minus the router's, nats per token."""
        return self.losses[chooser].minus(self.losses[CHOOSERS[0]])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layers": [
                {"layer": index, "rank_correlation": layer.rank_correlation} | layer.overlap.to_dict()
                for index, layer in self.layers.items()
            ],
            "loss": {chooser: losses.mean for chooser, losses in self.losses.items()},
            "difference": {
                chooser: (difference.value, difference.stderr)
                for chooser, difference in ((name, self.difference(name)) for name in CHOOSERS[1:])
            },
            "texts": len(self.losses[CHOOSERS[0]].targets),
        }


@torch.inference_mode()
def against_oracle(model: Any, windows: list[list[int]]) -> OracleRouting:
    """Measure a router on one text.

    Args:
        model: routes tokens, in eval mode and calibrated for its mode.
        windows: token ids of each stretch that the model sees apart.
    """
    layers: dict[int, OracleLayer] = {}
    nats, targets = dict.fromkeys(CHOOSERS, 0.0), 0
    for number, ids in enumerate(windows):
        row = torch.tensor([ids], device=model.device)
        walk = _Walk(model, row, np.random.default_rng([number, zlib.crc32(np.array(ids).tobytes())]))
        hidden = {"router": walk.along_router(layers)}
        hidden |= {chooser: walk.chosen_by(chooser) for chooser in CHOOSERS[1:]}
        for chooser, states in hidden.items():
            nats[chooser] += float(np.nansum(next_token_losses(model, states[0], row[0])))
        targets += len(ids) - 1
    return OracleRouting(
        layers, {name: TextLosses(np.array([value]), np.array([targets])) for name, value in nats.items()}
    )


class _Walk:
    """Passes of one window [1, T] through the stack, layer by layer."""

    def __init__(self, model: Any, row: Tensor, random: np.random.Generator) -> None:
        self.stack, self.row, self.random = model.model, row, random
        self.counts: dict[int, int] = {}  # tokens that the router took, by layer

    def along_router(self, layers: dict[int, OracleLayer]) -> Tensor:
        """The router's own pass; adds what is seen of each layer to `layers`. Returns hidden states [1, T, D]."""
        passing = self._enter()
        for index in range(len(self.stack.layers)):
            sizes = self._sizes(index, passing) if index in self.stack.routed else None
            self.stack.step(index, passing)
            if sizes is not None:
                record = passing.records[-1]
                self.counts[index] = int(record.selected.sum())
                oracle = _largest(sizes, self.counts[index], passing.frame)
                seen = _compare(record.scores[0], record.selected[0], sizes, oracle, passing.frame)
                layers[index] = layers[index] + seen if index in layers else seen
        return self.stack.norm(passing.hidden_states)

    def chosen_by(self, chooser: str) -> Tensor:
        """A pass in which somebody else chooses as many tokens. Returns hidden states [1, T, D]."""
        passing = self._enter()
        for index in range(len(self.stack.layers)):
            if index in self.stack.routed:
                chosen = self._choice(chooser, index, passing)
                passing.frame = replace(passing.frame, chosen={index: chosen.unsqueeze(0)})
            self.stack.step(index, passing)
        return self.stack.norm(passing.hidden_states)

    def _choice(self, chooser: str, index: int, passing: Any) -> Tensor:
        """Bool [T]."""
        if chooser == "every token":
            passing.frame = replace(passing.frame, capacities={**passing.frame.capacities, index: 1.0})
            return torch.ones_like(self.row[0], dtype=torch.bool)
        if chooser == "random":
            sizes = torch.from_numpy(self.random.random(self.row.shape[1], dtype=np.float32)).to(self.row.device)
        else:
            sizes = self._sizes(index, passing)
        return _largest(sizes, self.counts[index], passing.frame)

    def _enter(self) -> Any:
        passing = self.stack.enter(self.stack.embed_tokens(self.row))
        passing.frame.prepare()
        return passing

    def _sizes(self, index: int, passing: Any) -> Tensor:
        """What each token would lose by skipping the layer, as a norm, float32 [T]; the pass stays where it is."""
        states = []
        for everyone in (True, False):
            chosen = None if everyone else {index: torch.zeros_like(self.row, dtype=torch.bool)}
            capacities = {**passing.frame.capacities, index: 1.0 if everyone else 0.5}
            aside = replace(passing, frame=replace(passing.frame, capacities=capacities, chosen=chosen), records=[])
            self.stack.step(index, aside)
            states.append(aside.hidden_states)
        return (states[0] - states[1])[0].float().norm(dim=-1)


def _largest(sizes: Tensor, count: int, frame: RoutingFrame) -> Tensor:
    """The sinks and the largest other tokens, `count` together; bool [T]."""
    if frame.sinks is not None:
        sizes = sizes.masked_fill(frame.sinks[0], torch.inf)
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(0, sizes.topk(count).indices, True)


def _compare(scores: Tensor, routed: Tensor, sizes: Tensor, oracle: Tensor, frame: RoutingFrame) -> OracleLayer:
    from scipy import stats

    counted = slice(None) if frame.sinks is None else ~frame.sinks[0].cpu().numpy()
    ranked, updates, ours, theirs = (each.cpu().numpy()[counted] for each in (scores, sizes, routed, oracle))
    varies = len(ranked) > 2 and np.ptp(ranked) > 0 and np.ptp(updates) > 0
    correlation = float(stats.spearmanr(ranked, updates).statistic) if varies else 0.0
    return OracleLayer(Overlap.of(ours, theirs), correlation * len(ranked), len(ranked) if varies else 0)
