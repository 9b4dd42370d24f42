"""One text through a routed model: for every token the layers that took it, why, and how well it was predicted."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dtfcli.errors import ConfigError
from dtfcli.inspection.agreement import Agreement, Overlap
from dtfcli.inspection.losses import next_token_losses
from dtfcli.inspection.oracle import OracleRouting, against_oracle
from dtfcli.inspection.scores import OTHER, READINGS, Floats, LayerRouting, Reading, layer_routing
from dtfcli.inspection.token_classes import classify
from dtfcli.inspection.tokens import TokenizedText, tokenize
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM
from dtfcli.models.observed import observed_passes
from dtfcli.models.pretrained import is_routed
from dtfcli.models.stock import longest_text

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Inspected:
    """Which model routed, and how.

    Attributes:
        model: the model's name for people.
        architecture, score: such as "dtf" by "forecast_error"; other architectures have a score of their own name.
        bypass: how a token leaves a layer that it does not enter: "identity" or with a "forecast".
        routing, capacity: the mode; γ, or one for each routed layer.
    """

    model: str
    architecture: str
    score: str
    bypass: str
    routing: str
    capacity: Any

    @property
    def causal(self) -> bool:
        """Whether a token's path depends on nothing after it."""
        return self.routing != "topk"

    @property
    def reading(self) -> Reading:
        """How to read the scores."""
        return OTHER if self.routing == "predictor" else READINGS.get(self.score, OTHER)

    @property
    def name(self) -> str:
        """Architecture and score, for people."""
        name = {"dtf": "DTF", "mod": "MoD"}.get(self.architecture, self.architecture)
        return name if self.score == self.architecture else f"{name} by {self.score}"

    @property
    def gamma(self) -> str:
        """γ, for people."""
        capacities = self.capacity if isinstance(self.capacity, (list, tuple)) else [self.capacity]
        return "γ " + ", ".join(f"{capacity:g}" for capacity in capacities)

    def heading(self) -> dict[str, Any]:
        """The above, for JSON and the page."""
        names = ("model", "architecture", "score", "bypass", "routing", "causal", "capacity")
        return {name: getattr(self, name) for name in names}


def inspected(model: Any, name: str) -> Inspected:
    """Name a model and its way of routing."""
    config = model.config
    score = config.score if config.architecture == "dtf" else config.architecture
    return Inspected(name, config.architecture, score, config.bypass, model.routing, model.capacity)


@dataclass(frozen=True)
class TextRouting(Inspected):
    """A text, token by token, and the decisions of each routed layer.

    Attributes:
        source: the text and its tokens.
        layers: one entry for each routed layer.
        loss: [T] nats, −ln p(token | the tokens before it in its window); NaN for the first of a window.
        sinks: [T], tokens that are routed always, whatever their score.
        windows: first token of each part that the model saw alone, because the text is longer than its positions.
        classes: one of `token_classes.CLASSES` for each token.
        agreement: of this mode with the other one, causal and `topk`; None if one of them is not available.
        oracle: the router against the tokens that lose most by skipping, if that was measured.
    """

    source: TokenizedText
    layers: list[LayerRouting]
    loss: Floats
    sinks: Flags
    windows: list[int]
    classes: list[str]
    agreement: Agreement | None = None
    oracle: OracleRouting | None = None

    @property
    def tokens(self) -> list[str]:
        """The text of each token, with the characters that the tokenizer dropped in front of it."""
        return [gap + piece for gap, piece in zip(self.source.gaps, self.source.pieces, strict=True)]

    @property
    def selected(self) -> Flags:
        """[L, T]: which tokens entered which routed layer."""
        return np.array([layer.selected for layer in self.layers])

    @cached_property
    def depth(self) -> list[int]:
        """For each token the number of routed layers that it entered."""
        return list(self.selected.sum(0).tolist())

    @property
    def depth_share(self) -> Floats:
        """[T]: depth over the number of routed layers."""
        return np.array(self.depth) / len(self.layers)

    @property
    def routed_share(self) -> float:
        """Share of tokens over all routed layers."""
        return float(self.depth_share.mean())

    @property
    def positions(self) -> NDArray[np.int64]:
        """[T], counted from 0 in each window."""
        sizes = np.diff([*self.windows, len(self.source)])
        return np.concatenate([np.arange(size) for size in sizes])

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: per token and layer."""
        source = self.source
        return self.heading() | {
            "routed_share": self.routed_share,
            "text": source.text,
            "tokens": self.tokens,
            "token_ids": source.ids,
            "starts": source.starts,
            "windows": self.windows,
            "positions": self.positions.tolist(),
            "classes": self.classes,
            "sinks": self.sinks.tolist(),
            "depth": self.depth,
            "loss": [None if math.isnan(value) else value for value in self.loss.tolist()],
            "layers": [
                {
                    "layer": layer.layer,
                    "routed_share": layer.routed_share,
                    "threshold": layer.threshold,
                    "shown_threshold": layer.shown_threshold,
                    "selected": layer.selected.tolist(),
                    **{name: values.tolist() for name, values in layer.measures().items()},
                }
                for layer in self.layers
            ],
        }


@torch.inference_mode()
def inspect_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str = "",
    other_mode: bool = True,
    oracle: bool = False,
) -> TextRouting:
    """Run a text through a routed model, in the model's routing mode, and keep every decision.

    A text longer than the model's positions is cut into windows, each routed on its own.

    Args:
        model: a routed model in eval mode.
        tokenizer: the model's.
        text: any text.
        name: the model's name for people.
        other_mode: route once more in the other mode, causal or `topk`, and compare.
        oracle: compare with an oracle, which takes the tokens that lose most by skipping.

    Raises:
        ConfigError: the model is dense, not calibrated for its mode and capacity, or chooses no tokens that an oracle
            could choose; or the text is empty.
    """
    require_routed(model, name)
    if oracle and isinstance(model, RoutedCausalLM):
        raise ConfigError("--against-oracle: this model routes MLPs alone, and the oracle takes blocks; leave it out.")
    if oracle and model.config.architecture == "layerdrop":
        raise ConfigError(
            "--against-oracle: layerdrop leaves out whole layers, so there is no choice of tokens to compare; name a "
            "dtf, mod or random model."
        )
    source = tokenize(tokenizer, text)
    size = longest_text(model.config)
    windows = list(range(0, len(source), size))
    rows = [torch.tensor([source.ids[start : start + size]], device=model.device) for start in windows]
    passes = [_stack(model, row) for row in rows]
    layers = [layer_routing(model, list(records)) for records in zip(*(out.routing for out in passes), strict=True)]
    measured = None
    if oracle:
        measured, costs = against_oracle(model, rows)
        layers = [replace(layer, figures={**layer.figures, "true_cost": costs[layer.layer]}) for layer in layers]
    losses = [next_token_losses(model, out.last_hidden_state[0], row[0]) for out, row in zip(passes, rows, strict=True)]
    sinks = [torch.zeros_like(row) if out.sinks is None else out.sinks for out, row in zip(passes, rows, strict=True)]
    return TextRouting(
        **vars(inspected(model, name)),
        source=source,
        layers=layers,
        loss=np.concatenate(losses),
        sinks=torch.cat(sinks, dim=1)[0].bool().cpu().numpy(),
        windows=windows,
        classes=classify(source),
        agreement=_other_mode(model, rows, layers) if other_mode else None,
        oracle=measured,
    )


def require_routed(model: Any, name: str = "") -> None:
    """Refuse a dense model with a ConfigError."""
    if not is_routed(model):
        which = f"{name}: this" if name else "this"
        raise ConfigError(f"{which} model is dense: every token takes every layer, so there is no routing to show.")


def _stack(model: Any, row: torch.Tensor) -> Any:
    passes: list[Any] = []
    try:
        with observed_passes(model, passes.append):
            model.get_decoder()(input_ids=row, use_cache=False)
        return passes[0]
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def _other_mode(model: Any, rows: list[torch.Tensor], layers: list[LayerRouting]) -> Agreement | None:
    """Agreement with `topk`, or with `threshold` for a model that routes by `topk`, at the same capacity.

    None if the model is not calibrated for `threshold`, or has routed MLPs, which know no other mode.
    """
    if isinstance(model, RoutedCausalLM):
        return None
    other = "threshold" if model.routing == "topk" else "topk"
    with model.routing_mode(other, model.capacity_override):
        try:
            passes = [_stack(model, row).routing for row in rows]
        except ConfigError:
            return None
    overlaps = {}
    for layer, records in zip(layers, zip(*passes, strict=True), strict=True):
        selected = torch.cat([record.selected for record in records], dim=1)[0].cpu().numpy()
        overlaps[layer.layer] = Overlap.of(layer.selected, selected)
    return Agreement(model.routing, other, overlaps)
