"""What one forward pass tells all of its routed layers: mode, γ, thresholds, padding and sinks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .routing import sink_mask


@dataclass(frozen=True)
class RoutingContext:
    """What all routed layers of one forward pass share.

    Attributes:
        config: of the model; whatever does not change from pass to pass.
        mode: "topk", "threshold" or "predictor".
        shape: B and T.
        device: of the tokens.
        capacities: γ of each routed layer in this pass, by layer index.
        thresholds: of each routed layer in a causal mode, float32 0-d.
        padding_mask: bool [B, S + T], False for padding, over the S cached positions and the T new ones; None: no
            padding.
        past: S.
        chosen: who enters, bool [B, T], in layers whose router is not to choose (as many of each row in `topk`).
        syncs: whether each routed layer asks the device how many tokens enter, so that no slot stays free.
        noise: uniform numbers [B, T] that draw the tokens to explore; None: none are.
        shows_updates: whether layers return what each token is before and after their routed part.
        triton_kernels: whether linear maps of a layer that no row enters read no weights (`static`).
        shared: what routers compute once for all layers (`Router.prepare`).
    """

    config: Any
    mode: str
    shape: tuple[int, int]
    device: torch.device
    capacities: Mapping[int, float]
    thresholds: dict[int, Tensor] = field(default_factory=dict)
    padding_mask: Tensor | None = None
    past: int = 0
    chosen: Mapping[int, Tensor] = field(default_factory=dict)
    syncs: bool = True
    noise: Tensor | None = None
    shows_updates: bool = False
    triton_kernels: bool = False
    shared: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def is_token(self) -> Tensor | None:
        """Which of the new positions are no padding, bool [B, T]; None: all."""
        return None if self.padding_mask is None else self.padding_mask[:, self.past :]

    @cached_property
    def all_sinks(self) -> Tensor | None:
        """Which of all positions are sinks, bool [B, S + T]; None: there are none."""
        shape = (self.shape[0], self.past + self.shape[1])
        return sink_mask(self.padding_mask, self.config.sink_tokens, shape, self.device)

    @cached_property
    def sinks(self) -> Tensor | None:
        """Which of the new positions are sinks, bool [B, T]; None: there are none."""
        if self.padding_mask is None and self.past >= self.config.sink_tokens:
            return None
        return None if self.all_sinks is None else self.all_sinks[:, self.past :]

    @cached_property
    def shared_capacity(self) -> float | None:
        """γ of all routed layers; None: they differ."""
        values = set(self.capacities.values())
        return values.pop() if len(values) == 1 else None


@dataclass(frozen=True, kw_only=True)
class StaticContext(RoutingContext):
    """The context of a token of each row on top of a static cache: all shapes are the same in every pass.

    Attributes:
        filled: bool [B, N], which of the cache's positions hold a token that may be attended to, the new ones included.
        position: int64 [1], the position of the new ones.
    """

    filled: Tensor
    position: Tensor

    def visible(self, window: int | None) -> Tensor:
        """Which of the cache's positions the new tokens attend to, bool [B, 1, 1, N]."""
        if window is None:
            return self.filled[:, None, None]
        positions = torch.arange(self.filled.shape[1], device=self.device)
        return (self.filled & (positions > self.position - window))[:, None, None]

    is_token: None = field(default=None, init=False)
    """All: a row whose text has ended goes on with tokens that nobody reads."""

    @cached_property
    def sinks(self) -> Tensor | None:
        """Whether the new token is a sink, bool [B, 1]; None: there are none."""
        count = self.config.sink_tokens
        return self.filled.sum(1, keepdim=True) <= count if count else None
