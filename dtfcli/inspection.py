"""What a routed model does with a text: which tokens enter which layers, and how surprising they were."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dtfcli.errors import ConfigError


@dataclass(frozen=True)
class LayerRouting:
    """One routed layer over one text; lists have an entry for each token.

    Attributes:
        layer: index in the stack.
        selected: whether the token entered the layer.
        gate: its soft gate, G (DTF), σ(r) or r (MoD).
        score: what was compared with `threshold`.
        threshold: of the layer, in `threshold` mode.
        static_surprise, change_surprise, s_ce, s_cu: D_st, D_ch, S_CE, S_CU (DTF), else None.
    """

    layer: int
    selected: list[bool]
    gate: list[float]
    score: list[float]
    threshold: float | None
    static_surprise: list[float] | None
    change_surprise: list[float] | None
    s_ce: list[float] | None
    s_cu: list[float] | None

    @property
    def routed_share(self) -> float:
        """Share of the tokens that entered the layer."""
        return sum(self.selected) / len(self.selected)

    def mean(self, name: str) -> float | None:
        """Mean over tokens of one of the per-token lists."""
        values = getattr(self, name)
        return None if values is None else sum(values) / len(values)


@dataclass(frozen=True)
class TextRouting:
    """A text, token by token, and what each routed layer did with it."""

    routing: str
    capacity: Any
    architecture: str
    tokens: list[str]
    layers: list[LayerRouting]

    @property
    def depth(self) -> list[int]:
        """For each token the number of routed layers that it entered."""
        return [sum(layer.selected[t] for layer in self.layers) for t in range(len(self.tokens))]

    @property
    def routed_share(self) -> float:
        """Share of tokens over all routed layers."""
        return sum(layer.routed_share for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        layers = [asdict(layer) | {"routed_share": layer.routed_share} for layer in self.layers]
        return asdict(self) | {"layers": layers, "depth": self.depth, "routed_share": self.routed_share}


@torch.inference_mode()
def inspect_text(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> TextRouting:
    """Run a text through a routed model, in the model's routing mode, and keep every decision.

    Raises:
        ConfigError: the model is dense, or the text is empty or longer than the model's positions.
    """
    if not hasattr(model, "set_routing"):
        raise ConfigError("this model is dense: every token takes every layer, so there is no routing to show.")
    input_ids: list[int] = tokenizer(text)["input_ids"]
    limit = model.config.max_position_embeddings
    if not input_ids:
        raise ConfigError("the text is empty: give a TEXT or --file.")
    if len(input_ids) > limit:
        raise ConfigError(f"the text has {len(input_ids)} tokens, more than the model's {limit} positions; shorten it.")
    out = model(torch.tensor([input_ids], device=model.device), output_routing=True)
    return TextRouting(
        routing=model.routing,
        capacity=model.capacity,
        architecture=model.config.architecture,
        tokens=[str(tokenizer.decode([token])) for token in input_ids],
        layers=[
            LayerRouting(
                layer=record.layer,
                selected=record.selected[0].tolist(),
                gate=record.gate[0].tolist(),
                score=record.scores[0].tolist(),
                threshold=None if record.threshold is None else float(record.threshold),
                static_surprise=_row(record.static_surprise),
                change_surprise=_row(record.change_surprise),
                s_ce=_row(record.s_ce),
                s_cu=_row(record.s_cu),
            )
            for record in out.routing
        ],
    )


def _row(values: torch.Tensor | None) -> list[float] | None:
    return None if values is None else values[0].tolist()
