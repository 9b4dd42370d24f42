"""The cost of each layer: the loss of a text without it, all other layers in place.

The layers are those of the dense model, or of the backbone of a routed one. Their order, the costliest first, is what
`model.layer_order` takes for `layerdrop`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dtfcli.inspection.losses import next_token_losses
from dtfcli.inspection.tokens import tokenize
from dtfcli.models.configuration_fields import resolve_routed_layers
from dtfcli.models.conversion import to_dense
from dtfcli.models.pretrained import is_routed
from dtfcli.models.stock import longest_text
from dtfcli.statistics import Difference, TextLosses


@dataclass(frozen=True)
class Sensitivity:
    """The loss of some texts without each layer.

    Attributes:
        model: the model's name for people.
        layers: indices of the layers that were left out, one at a time.
        routed: indices of the routed layers; of a dense model, the default ones.
        losses: of each text, by the layer that was left out; None: no layer was.
    """

    model: str
    layers: list[int]
    routed: list[int]
    losses: dict[int | None, TextLosses]

    def cost(self, layer: int) -> Difference:
        """Loss without a layer minus that with it, nats per token, over texts."""
        return self.losses[layer].minus(self.losses[None])

    @property
    def loss(self) -> float:
        """With all layers, nats per token."""
        return self.losses[None].mean

    @property
    def order(self) -> list[int]:
        """The routed layers, the costliest first: `model.layer_order`."""
        return sorted(self.routed, key=lambda layer: -self.cost(layer).value)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        costs = {layer: self.cost(layer) for layer in self.layers}
        return {
            "model": self.model,
            "loss": self.loss,
            "texts": len(self.losses[None].targets),
            "tokens": int(self.losses[None].targets.sum()),
            "layers": [
                {"layer": layer, "routed": layer in self.routed, "cost": cost.value, "stderr": cost.stderr}
                for layer, cost in costs.items()
            ],
            "layer_order": self.order,
        }


@torch.inference_mode()
def sensitivity(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, name: str = "") -> Sensitivity:
    """Measure the cost of each layer.

    Args:
        model: dense or routed, in eval mode.
        tokenizer: the model's.
        texts: one or more; longer ones are cut into windows of the model's positions.
        name: the model's name for people.

    Raises:
        ConfigError: a text is empty.
    """
    routed = model.routed_layers if is_routed(model) else None
    dense = model if routed is None else to_dense(model)
    count = dense.config.num_hidden_layers
    losses: dict[int | None, TextLosses] = {}
    for text in texts:
        ids, size = tokenize(tokenizer, text).ids, longest_text(dense.config)
        windows = [torch.tensor([ids[at : at + size]], device=dense.device) for at in range(0, len(ids), size)]
        targets = np.array([len(ids) - len(windows)])
        for layer in (None, *range(count)):
            with _left_out(dense, layer):
                loss = TextLosses(np.array([sum(_nats(dense, row) for row in windows)]), targets)
            losses[layer] = losses[layer] + loss if layer in losses else loss
    assert losses, "no text"
    by_default = resolve_routed_layers("alternate", 0, count)
    return Sensitivity(name, list(range(count)), by_default if routed is None else list(routed), losses)


def _nats(model: Any, row: Tensor) -> float:
    hidden = model.model(input_ids=row, use_cache=False).last_hidden_state
    return float(np.nansum(next_token_losses(model, hidden[0], row[0])))


@contextmanager
def _left_out(model: Any, layer: int | None) -> Iterator[None]:
    """The stock model without one layer: what enters it, leaves it."""
    if layer is None:
        yield
        return

    def skip(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        return arguments[0] if arguments else named["hidden_states"]

    hook = model.model.layers[layer].register_forward_hook(skip, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
