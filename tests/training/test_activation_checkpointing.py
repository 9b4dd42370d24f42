"""Gradient checkpointing, all of it and selective: the same gradients, and the operations that are done twice."""

from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode

from dtfcli.models.conversion import convert
from dtfcli.training.activation_checkpointing import checkpoint_activations
from dtfcli.training.compiling import compile_layers
from dtfcli.training.curriculum import annealed_capacity
from dtfcli.training.objectives import Objective
from tests.tiny import ARCHITECTURES, dense_model, tokens

KINDS = ("nothing", "selective", "all")


def a_step(family: str, architecture: str, kind: str, **fields: Any) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients of a step; its FLOPs."""
    model = dense_model(family)
    if architecture != "dense":
        model = convert(model, architecture, prior_dropout=0.2, **fields)
    if kind != "nothing":
        checkpoint_activations(model, selective=kind == "selective")
    objective = Objective(model).train()
    torch.manual_seed(3)
    with FlopCounterMode(display=False) as counter:
        loss = objective(tokens(2, 64), 2 * 63).loss
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [loss.detach(), *gradients], counter.get_total_flops()


@pytest.mark.parametrize(
    ("family", "architecture", "fields"),
    [
        ("llama", "dense", {}),
        ("qwen2", "dtf", {}),
        ("qwen2", "mod", {}),
        ("llama", "dtf", {"kv_tokens": "all", "gate": "soft"}),
        ("llama", "mod", {"kv_tokens": "all", "gate": "soft"}),
    ],
)
def test_the_same_gradients_and_the_operations_done_twice(
    family: str, architecture: str, fields: dict[str, Any]
) -> None:
    steps = {kind: a_step(family, architecture, kind, **fields) for kind in KINDS}
    for kind in KINDS[1:]:
        assert len(steps[kind][0]) == len(steps["nothing"][0])
        for plain, recomputed in zip(steps["nothing"][0], steps[kind][0], strict=True):
            torch.testing.assert_close(recomputed, plain)
    flops = {kind: step[1] for kind, step in steps.items()}
    # Attention on the CPU is counted by nobody; the loss lies outside of the layers.
    assert flops["selective"] == flops["nothing"] < flops["all"] <= 4 / 3 * flops["nothing"]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_tokens_while_thresholds_move(architecture: str, kind: str) -> None:
    """Trained by threshold, a forward pass tracks the thresholds before its layers are recomputed with them."""

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = convert(dense_model("llama"), architecture)
        model.calibrate([{"input_ids": tokens(8, 64, seed=5)}], capacities=())
        model.set_training_routing("threshold")
        for router in model.model.routers.values():
            router.thresholds[0] -= 0.5  # so that tracking moves it
        if recompute:
            checkpoint_activations(model, selective=kind == "selective")
        before = [router.thresholds[0].item() for router in model.model.routers.values()]
        Objective(model).train()(tokens(2, 64), 2 * 63).loss.backward()
        assert all(r.thresholds[0].item() != b for r, b in zip(model.model.routers.values(), before, strict=True))
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize(("routing", "gate"), [("topk", "soft"), ("threshold", "straight_through")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reentrant_checkpointing_as_trainers_may_ask_for(architecture: str, gate: str, routing: str) -> None:
    """It runs a layer without gradients first, and needs the same objects from both runs."""

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = convert(dense_model("llama"), architecture, gate=gate, prior_dropout=0.2)
        model.calibrate([{"input_ids": tokens(8, 64, seed=5)}], capacities=())
        model.set_training_routing(routing)
        model.enable_input_require_grads()
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": True})
        torch.manual_seed(3)
        model.train()(tokens(2, 64), labels=tokens(2, 64), use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dense", "dtf"])
def test_recomputed_and_compiled(architecture: str) -> None:
    """The compiler sees the checkpoint inside of a layer, and its graphs keep the results of products."""

    def gradients(kind: str) -> tuple[list[torch.Tensor], int]:
        products = 0

        def count(graph: Any, inputs: Any) -> Any:
            nonlocal products
            products += sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        model = dense_model("llama")
        if architecture != "dense":
            model = convert(model, architecture)
        if kind != "nothing":
            checkpoint_activations(model, selective=kind == "selective")
        partition = min_cut_rematerialization_partition
        backend: Any = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition)
        compile_layers(model, backend=backend)
        Objective(model).train()(tokens(2, 64), 2 * 63).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], products

    steps = {kind: gradients(kind) for kind in KINDS}
    for kind in KINDS[1:]:
        for plain, recomputed in zip(steps["nothing"][0], steps[kind][0], strict=True):
            torch.testing.assert_close(recomputed, plain)
    assert 0 < steps["selective"][1] == steps["nothing"][1] < steps["all"][1]


@pytest.mark.slow
def test_compiled_with_many_capacities_and_while_one_is_annealed() -> None:
    """A layer is compiled for the number of tokens that it routes: the compiler gives up after eight of them."""
    torch._dynamo.reset()
    own = [0.1 + 0.08 * layer for layer in range(10)]
    model = convert(dense_model("llama", num_hidden_layers=20), "mod", own)
    objective = Objective(model).train()
    compile_layers(model, backend="eager")

    def step() -> torch.Tensor:
        model.zero_grad()
        objective(tokens(2, 50), 2 * 49).loss.backward()
        gradient = model.model.layers[1].mlp.up_proj.weight.grad
        assert gradient is not None
        return gradient.clone()

    plain = step()
    for left in torch.linspace(1.0, 0.1, 12).tolist():
        with annealed_capacity(model, left, 1.0):
            assert not torch.equal(step(), plain)
    torch.testing.assert_close(step(), plain)
