"""Gradient checkpointing, all of it and selective: the same gradients, and what is done twice."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dtfcli.models.conversion import convert
from dtfcli.training.objectives import Objective
from dtfcli.training.recomputing import recompute_activations
from tests.tiny import ARCHITECTURES, FAMILIES, dense_model, tokens

KINDS = ("nothing", "selective", "all")


def a_step(family: str, architecture: str, kind: str, **fields: Any) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients of a step; its FLOPs."""
    model = dense_model(family)
    if architecture != "dense":
        model = convert(model, architecture, prior_dropout=0.2, **fields)
    if kind != "nothing":
        recompute_activations(model, selective=kind == "selective")
    objective = Objective(model).train()
    torch.manual_seed(3)
    with FlopCounterMode(display=False) as counter:
        loss = objective(tokens(2, 64), 2 * 63).loss
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [loss.detach(), *gradients], counter.get_total_flops()


@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_gradients_and_what_is_done_twice(family: str, architecture: str) -> None:
    steps = {kind: a_step(family, architecture, kind) for kind in KINDS}
    for kind in KINDS[1:]:
        assert len(steps[kind][0]) == len(steps["nothing"][0])
        for plain, recomputed in zip(steps["nothing"][0], steps[kind][0], strict=True):
            torch.testing.assert_close(recomputed, plain)
    flops = {kind: step[1] for kind, step in steps.items()}
    # Attention on the CPU is counted by nobody; the loss lies outside of the layers.
    assert flops["selective"] == flops["nothing"] < flops["all"] <= 4 / 3 * flops["nothing"]


@pytest.mark.parametrize("kv_tokens", ["routed", "all"])
def test_selective_with_soft_gates_and_every_key(kv_tokens: str) -> None:
    for architecture in ARCHITECTURES:
        fields = {"kv_tokens": kv_tokens, "gate": "soft"}
        plain, selective = (a_step("llama", architecture, kind, **fields)[0] for kind in KINDS[:2])
        for a, b in zip(plain, selective, strict=True):
            torch.testing.assert_close(b, a)
