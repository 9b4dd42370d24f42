"""Losses and gradients that the tests on a GPU compare with the CPU's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtfcli.training.objectives import Objective
from tests.cases import Case


def build(way: str, family: str = "llama", **fields: Any) -> Any:
    """A model of one's own on the CPU, calibrated."""
    return Case(way, family).fresh(**fields)


def losses_and_gradients(model: Any, ids: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loss and every parameter's gradient by name, on the CPU in float32; under autocast to a half precision."""
    objective = Objective(model).train()
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        loss = objective(ids, ids[:, 1:].numel()).loss
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach().cpu()}


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """The same names, and tensors no further apart than a share of the largest element and a little; NaN is NaN."""
    assert found.keys() == expected.keys()
    apart = {}
    for name, theirs in expected.items():
        ours = found[name].detach().cpu()
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        difference = float(torch.where(same, 0.0, (ours - theirs).abs()).max())
        largest = float(torch.where(theirs.isfinite(), theirs, 0.0).abs().max())
        if not difference <= tolerance * (0.01 + largest):
            apart[name] = difference, largest
    assert not apart
