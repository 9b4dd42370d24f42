"""How many tokens routed layers really take: measured over any number of forward passes, by layer and by position.

A capacity γ is a wish; every report shows the realized share next to it. Benchmarks and chats begin with short rows,
so the share is also by the position of a token in its row.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtfcli.models.observed import observed_passes
from dtfcli.models.outputs import RoutedModelOutput
from dtfcli.models.pretrained import is_routed

POSITION_STARTS = (1, 16, 64, 256)
POSITION_NAMES = ("1-15", "16-63", "64-255", "256+")
"""Positions count from 0. Position 0 has a bucket of its own, which is not reported: it usually is a sink."""


@dataclass(frozen=True)
class Shares:
    """Routed tokens over real tokens."""

    by_layer: dict[int, float]
    by_position: dict[str, float]  # over all routed layers, for each of `POSITION_NAMES` that had tokens
    overall: float  # mean over layers
    tokens: int  # real ones


class ShareMeter:
    """Adds up routed tokens of forward passes; synchronizes with the device only when it is read."""

    def __init__(self) -> None:
        self._routed: dict[int, Tensor] = {}
        self._real: Tensor | float = 0.0

    def add(self, output: RoutedModelOutput) -> None:
        """Count the tokens of one forward pass of a stack."""
        assert output.routing is not None
        assert output.positions is not None
        selected = torch.stack([record.selected for record in output.routing])
        like = selected[0]
        buckets = torch.bucketize(output.positions, output.positions.new_tensor(POSITION_STARTS), right=True)
        one_hot = torch.nn.functional.one_hot(buckets.expand_as(like), len(POSITION_STARTS) + 1)
        real = torch.ones_like(like) if output.is_token is None else output.is_token
        self._real = self._real + _count(real, one_hot)
        for record, counts in zip(output.routing, _count(selected, one_hot), strict=True):
            self._routed[record.layer] = self._routed.get(record.layer, 0.0) + counts

    def counts(self) -> dict[str, Any]:
        """The counts as plain numbers for `add_counts`: real tokens by position, routed ones by layer too."""
        routed = {str(layer): torch.as_tensor(counts).tolist() for layer, counts in self._routed.items()}
        return {"real": torch.as_tensor(self._real).tolist(), "routed": routed} if routed else {}

    def add_counts(self, counts: dict[str, Any]) -> None:
        """Add the counts of another meter."""
        if counts:
            self._real = self._real + torch.tensor(counts["real"], dtype=torch.float64)
            for layer, routed in counts["routed"].items():
                added = torch.tensor(routed, dtype=torch.float64)
                self._routed[int(layer)] = self._routed.get(int(layer), 0.0) + added

    def read(self) -> Shares:
        """The shares up to now; ValueError if no real token was counted."""
        real = torch.as_tensor(self._real).tolist()
        if not self._routed or sum(real) == 0:
            raise ValueError("no routed forward pass was measured")
        routed = {layer: counts.tolist() for layer, counts in self._routed.items()}
        by_layer = {layer: sum(counts) / sum(real) for layer, counts in routed.items()}
        by_position = {
            name: sum(counts[bucket] for counts in routed.values()) / (len(routed) * real[bucket])
            for bucket, name in enumerate(POSITION_NAMES, 1)
            if real[bucket]
        }
        return Shares(by_layer, by_position, sum(by_layer.values()) / len(by_layer), int(sum(real)))


def _count(mask: Tensor, one_hot: Tensor) -> Tensor:
    """Tokens of masks [..., B, T] in each bucket; float64, because float32 stops counting at 16 million."""
    return (mask.unsqueeze(-1) & one_hot.bool()).sum((-3, -2)).double()


@contextmanager
def measured_shares(model: Any) -> Iterator[ShareMeter]:
    """Measure every forward pass of a model inside a `with` block; a dense model routes nothing."""
    meter = ShareMeter()
    with observed_passes(model, meter.add) if is_routed(model) else nullcontext():
        yield meter
