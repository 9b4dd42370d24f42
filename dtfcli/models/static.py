"""The static cache: decoding in fixed shapes, one token of each row at a time, so that a GPU can replay the step.

A step of decoding is a hundred small operations; launching them costs the host more than computing them costs a GPU. A
CUDA graph launches all of them at once, if shapes, addresses and control flow are the same for every token:

    shapes      keys and values of N positions, whatever number is filled (`StaticLayerCache`)
    positions   how many are filled is a number on the device (`StaticState.position`)
    routing     every row passes through the block, and those that skip it are put back. Where no row enters, the
                kernels of `triton_kernels` return at once, before they read any weight.

The prompt runs as ever. Its cache is copied into the static one when the first single token follows. The model needs
`kv_tokens = "all"` and a score of the token alone.

Shape suffixes: B rows, H key/value heads, N positions that the cache is made for, E size of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import CacheLayerMixin

from .triton_kernels import counted_linear


@dataclass
class StaticState:
    """What all layers of a static cache share."""

    position: Tensor
    """int64 [1], on the device: where the next token goes."""
    filled: Tensor
    """bool [B, N], which positions hold tokens that may be attended to."""
    length: int
    """How many positions are filled, as the host knows."""
    graph: "StepGraph | None" = None
    """The step, once it was captured."""
    captured: Any = None
    """What the step depended on then."""

    def advance(self) -> None:
        """A token of each row more."""
        self.position.add_(1)
        self.length += 1

    def crop(self, tokens: int) -> None:
        """Forget the last positions, at most all."""
        tokens = min(tokens, self.length)
        self.position.sub_(tokens)
        self.length -= tokens
        self.filled[:, self.length :] = False

    def run(
        self, step: Callable[[Tensor, Tensor], Tensor], ids: Tensor, positions: Tensor, choices: Any = None
    ) -> Tensor:
        """What a step says of the next token: on a GPU by a CUDA graph, captured from the first step and kept.

        Args:
            step: from ids and positions, int64 [B, 1] each, to logits [B, 1, V]; it advances this state.
            choices: what the step depends on besides; if it changes, the step is captured again.
        """
        if not ids.is_cuda:
            return step(ids, positions)
        if self.graph is None or self.captured != choices:
            self.graph, self.captured = StepGraph(step, self, ids, positions), choices
        logits = self.graph.replay(ids, positions)
        self.length += 1
        return logits


class StaticLayerCache(CacheLayerMixin):
    """Keys and values of N positions in tensors that stay where they are.

    Args:
        keys, values: [B, H, S, E], of the positions seen so far.
        size: N.
        state: shared by all layers of the cache.
    """

    keys: Tensor
    values: Tensor
    is_compileable = False  # to Transformers: it would have `torch.compile` take care of it
    is_croppable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, size: int, state: StaticState) -> None:
        super().__init__()
        self.state = state
        self.dtype, self.device = keys.dtype, keys.device
        # Zeros where nothing is filled: a masked key may be anything but NaN.
        missing = (0, 0, 0, size - keys.shape[2])
        self.keys, self.values = (torch.nn.functional.pad(part, missing) for part in (keys, values))
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it was made of keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one token of each row, [B, H, 1, E]; returns those of all N positions."""
        self.keys.index_copy_(2, self.state.position, key_states)
        self.values.index_copy_(2, self.state.position, value_states)
        return self.keys, self.values

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions seen, [B, H, S, E]."""
        return self.keys[:, :, : self.state.length], self.values[:, :, : self.state.length]

    def get_seq_length(self) -> int:
        return self.state.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not."""
        return self.keys.nbytes + self.values.nbytes

    def reset(self) -> None:
        """Nothing: the positions are the state's."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: the positions are the state's."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for part in (self.keys, self.values):
            part.copy_(part.index_select(0, beam_idx.to(part.device)))


def static_layers(layers: list[Any], length: int, seen: Tensor | None) -> tuple[list[Any], StaticState]:
    """A `StaticLayerCache` of N positions for each layer of a cache, and the state that they share.

    Args:
        layers: whose keys and values hold all of the S positions seen.
        length: N.
        seen: bool [B, S], False for padding; None: there is none.
    """
    keys = layers[0].keys
    filled = torch.zeros(keys.shape[0], length, dtype=torch.bool, device=keys.device)
    filled[:, : keys.shape[2]] = True if seen is None else seen
    state = StaticState(torch.full((1,), keys.shape[2], device=keys.device), filled, keys.shape[2])
    return [StaticLayerCache(layer.keys, layer.values, length, state) for layer in layers], state


class EnteredRows(TorchFunctionMode):
    """Where no row enters a layer, linear maps inside of it read no weights and give zeros, which nobody uses.

    Args:
        entered: bool [B, 1].
    """

    def __init__(self, entered: Tensor) -> None:
        super().__init__()
        self.count = entered.any().to(torch.int32) * len(entered)  # all rows or none: weights are read once anyway

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        y = counted_linear(x.reshape(-1, x.shape[-1]), weight, bias, self.count)
        return y.view(*x.shape[:-1], len(weight))


class StepGraph:
    """One step of decoding as a CUDA graph: captured once, replayed for every token.

    Args:
        step: as of `StaticState.run`.
        state: as it is before the token; capturing leaves it as it was.
        ids, positions: of the first token.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor], Tensor], state: StaticState, ids: Tensor, positions: Tensor
    ) -> None:
        self.ids, self.positions = ids.clone(), positions.clone()
        position, filled, length = state.position.clone(), state.filled.clone(), state.length

        def restore() -> None:
            state.position.copy_(position)
            state.filled.copy_(filled)
            state.length = length

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # kernels are compiled and libraries take their memory: a capture allows neither
                step(self.ids, self.positions)
                restore()
        torch.cuda.current_stream().wait_stream(aside)
        self._recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._recorded):
            self.logits = step(self.ids, self.positions)
        restore()

    def replay(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, 1, V] of the next token."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self._recorded.replay()
        return self.logits.clone()  # the next token overwrites them
