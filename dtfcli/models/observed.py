"""Watches the passes of a routed model, whichever kind it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .modeling_routed_mlp import RoutedCausalLM, routed_mlps


@contextmanager
def observed_passes(model: Any, note: Callable[[Any], None]) -> Iterator[None]:
    """Call `note` with the output of each pass of a routed model's stack, a `RoutedModelOutput`, inside a `with` block.

    The stack of a model with routed MLPs is a stock one; its output gets the attributes. Blocks may nest.
    """

    def add(stack: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        if has_mlps and not hasattr(output, "routing"):
            length, mask, positions = output[0].shape[1], named.get("attention_mask"), named.get("position_ids")
            is_token = mask[:, -length:].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
            if positions is None and isinstance(mask, Tensor) and is_token is not None:
                positions = (mask.long().cumsum(1) - 1)[:, -length:].clamp(min=0)
            if positions is None:
                positions = torch.arange(length, device=output[0].device).unsqueeze(0)
            chosen = (r if is_token is None else r._replace(selected=r.selected & is_token) for r in records)
            output.routing, output.is_token, output.positions, output.sinks = tuple(chosen), is_token, positions, None
            records.clear()
        note(output)

    has_mlps = isinstance(model, RoutedCausalLM)
    active = [mlp.records for mlp in routed_mlps(model).values() if mlp.records is not None]
    with model.recorded() if has_mlps and not active else nullcontext(active[0] if active else []) as records:
        hook = model.get_decoder().register_forward_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
