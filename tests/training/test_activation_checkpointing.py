"""Gradient checkpointing, all of it and selective: the same gradients, and the operations that are done twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
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


def a_step(
    kind: str, architecture: str, prepare: Callable[[Any], None] = lambda model: None, **fields: Any
) -> list[Tensor]:
    """Loss and gradients of a step of a model that recomputes `kind`."""
    model = dense_model("llama" if fields else "qwen2")
    if architecture != "dense":
        model = convert(model, architecture, **{"prior_dropout": 0.2} | fields)
    if kind != "nothing":
        checkpoint_activations(model, selective=kind == "selective")
    prepare(model)
    torch.manual_seed(3)
    loss = Objective(model).train()(tokens(2, 64), 2 * 63).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def assert_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fields", [{}, {"kv_tokens": "all", "gate": "soft"}])
@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
def test_the_same_gradients_and_more_operations(architecture: str, fields: dict[str, Any]) -> None:
    steps, flops = {}, {}
    for kind in KINDS:
        with FlopCounterMode(display=False) as counter:
            steps[kind] = a_step(kind, architecture, **fields)
        flops[kind] = counter.get_total_flops()
        assert_alike(steps[kind], steps["nothing"])
    # Attention on the CPU is counted by nobody; the loss lies outside of the layers.
    assert flops["selective"] == flops["nothing"] < flops["all"] <= 4 / 3 * flops["nothing"]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_tokens_while_thresholds_move(architecture: str, kind: str) -> None:
    """Trained by threshold, a forward pass tracks the thresholds before its layers are recomputed with them."""
    moved: list[bool] = []

    def by_threshold(model: Any) -> None:
        model.calibrate([{"input_ids": tokens(8, 64, seed=5)}], capacities=())
        model.set_training_routing("threshold")
        for router in model.model.routers.values():
            router.threshold.sub_(0.5)  # so that tracking moves it
            before = router.threshold.item()
            model.model.register_forward_hook(lambda *_, r=router, b=before: moved.append(r.threshold.item() != b))

    assert_alike(a_step(kind, architecture, by_threshold), a_step("nothing", architecture, by_threshold))
    assert moved
    assert all(moved)


@pytest.mark.parametrize(("routing", "gate"), [("topk", "soft"), ("threshold", "straight_through")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reentrant_checkpointing_as_trainers_may_ask_for(architecture: str, gate: str, routing: str) -> None:
    """It runs a layer without gradients first, and needs the same objects from both runs."""

    def gradients(recompute: bool) -> list[Tensor]:
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

    assert_alike(gradients(True), gradients(False))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dense", "dtf"])
def test_recomputed_and_compiled(architecture: str) -> None:
    """The compiler sees the checkpoint inside of a layer, and its graphs keep the results of products."""
    products = dict.fromkeys(KINDS, 0)

    def compiled(kind: str) -> Callable[[Any], None]:
        def count(graph: Any, inputs: Any) -> Any:
            products[kind] += sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        partition = min_cut_rematerialization_partition
        backend: Any = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition)
        return lambda model: compile_layers(model, backend=backend)

    # Without dropout, whose numbers the compiler draws in another order.
    fields = {"prior_dropout": 0.0} if architecture == "dtf" else {}
    steps = {kind: a_step(kind, architecture, compiled(kind), **fields) for kind in KINDS}
    for kind in KINDS[1:]:
        assert_alike(steps[kind], steps["nothing"])
    assert 0 < products["selective"] == products["nothing"] < products["all"]


@pytest.mark.slow
def test_compiled_with_many_capacities_and_while_one_is_annealed() -> None:
    """A layer is compiled for the number of tokens that it routes: the compiler gives up after eight of them."""
    torch._dynamo.reset()
    own = [0.1 + 0.08 * layer for layer in range(10)]
    model = convert(dense_model("llama", num_hidden_layers=20), "mod", own)
    objective = Objective(model).train()
    compile_layers(model, backend="eager")

    def step() -> Tensor:
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
