"""`dtf bench --phases train`: what it counts is what torch counts, and what it prints is whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from dtfcli.bench.report import BenchOptions
from dtfcli.bench.steps import bench_training
from dtfcli.cost.accounting import training_step_flops
from dtfcli.models.conversion import convert
from dtfcli.models.pretrained import is_added
from dtfcli.training.compiling import compile_layers
from dtfcli.training.objectives import Objective
from tests.conftest import Outcome
from tests.tiny import ARCHITECTURES, FAMILIES, dense_model, tokens

Dtf = Callable[..., Outcome]
SHAPE = ["model.scratch.hidden_size=64", "model.scratch.intermediate_size=96", "model.scratch.num_hidden_layers=4"]
BENCH = ["bench", "quickstart", *SHAPE, "--device", "cpu", "--seq-len", "32", "--repeats", "2", "--phases"]


def flops_over_torchs(model: Any) -> float:
    """What is counted for a training step, over what torch counts while one runs."""
    rows, length = 2, 64
    objective = Objective(model).train()
    with FlopCounterMode(display=False) as counter:
        objective(tokens(rows, length), rows * (length - 1)).loss.backward()
    return training_step_flops(model, length) * rows * length / counter.get_total_flops()


@pytest.mark.parametrize("kv_tokens", ["routed", "all"])
@pytest.mark.parametrize("capacity", [0.5, 0.125])
@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
def test_flops_are_what_torch_counts(architecture: str, capacity: float, kv_tokens: str) -> None:
    """Forward and backward. The loss multiplies its matrices itself, and is seen by the counter like all others."""
    model = dense_model("llama", attn_implementation="eager", hidden_size=64, intermediate_size=96)
    if architecture != "dense":
        model = convert(model, architecture, capacity, kv_tokens=kv_tokens)
    assert flops_over_torchs(model) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("kv_tokens", ["routed", "all"])
@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
def test_flops_of_a_frozen_backbone(architecture: str, kv_tokens: str) -> None:
    """As LoRA has it: no products for the gradients of frozen weights. Below the first trained one, none for inputs."""
    model = dense_model(
        "llama", attn_implementation="eager", hidden_size=64, intermediate_size=96, num_hidden_layers=12
    )
    if architecture != "dense":
        model = convert(model, architecture, kv_tokens=kv_tokens)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name))
    low_rank = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    inject_adapter_in_model(low_rank, model)
    assert flops_over_torchs(model) == pytest.approx(1, rel=0.03)


def test_report(dtf: Dtf) -> None:
    result = dtf(
        *BENCH, "train", "--capacities", "0.5,0.25", "--stock", "--threads", "1", "--micro-batches", "2", "--json"
    )
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    steps = {(step["architecture"], step["capacity"]): step for step in report["training"]}
    routed = [(architecture, capacity) for architecture in ARCHITECTURES for capacity in (0.25, 0.5)]
    assert set(steps) == {("dense", 1.0), ("stock", 1.0), *routed}
    assert report["results"] == []
    assert report["threads"] == 1
    assert steps["dense", 1.0]["time_ratio"] == steps["dense", 1.0]["flop_ratio"] == 1.0
    for architecture in ARCHITECTURES:
        assert steps[architecture, 0.25]["flop_ratio"] < steps[architecture, 0.5]["flop_ratio"] < 1.0
    for step in steps.values():
        assert step["step_ms"] > 0
        assert step["optimizer_ms"] > 0
        assert step["tokens_per_second"] == pytest.approx(32e3 / step["step_ms"])
        assert step["peak_bytes"] is None or step["peak_bytes"] > 0


def test_all_phases_are_the_default(dtf: Dtf) -> None:
    result = dtf(*BENCH[:-1], "--new-tokens", "3", "--capacities", "0.5", "--calibration-tokens", "64", "--json")
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {entry["phase"] for entry in report["results"]} == {"prefill", "decode"}
    assert report["training"]


def test_weights_stay_and_gradients_go() -> None:
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    routed = {name: convert(dense, name) for name in ARCHITECTURES}
    bench_training(dense, routed, BenchOptions(capacities=[0.5], seq_len=16, repeats=1), print)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["trian"], "--phases trian: choose from train, prefill, decode. Did you mean 'train'?"),
        (["prefill", "--stock"], "--stock"),
        (["train", "--dtype", "float16"], "--dtype float16"),
    ],
)
def test_wrong_options(dtf: Dtf, extra: list[str], message: str) -> None:
    result = dtf(*BENCH, *extra)
    assert result.code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["soft", "straight_through"])
@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_are_the_eager_ones(family: str, architecture: str, gate: str) -> None:
    """No graph break in any layer (`fullgraph` makes one an error), no second compilation, equal values."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = dense_model(family)
    if architecture != "dense":
        model = convert(model, architecture, gate=gate)
    objective = Objective(model).train()
    batches = [tokens(2, 48, seed) for seed in range(3)]

    def losses_and_gradients() -> list[torch.Tensor]:
        objective.zero_grad(set_to_none=True)
        losses = [objective(batch, 2 * 47).loss for batch in batches]
        torch.stack(losses).sum().backward()
        return losses + [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]

    eager = losses_and_gradients()
    compile_layers(model, backend="aot_eager")
    compiled = losses_and_gradients()
    assert len(eager) == len(compiled)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if architecture == "dense" else 2)

    # What has no fixed shapes still runs, as it did.
    if architecture != "dense":
        model.calibrate([{"input_ids": batches[0]}], capacities=())
        model.set_training_routing("threshold")
        objective(batches[0], 2 * 47).loss.backward()
    with torch.no_grad():
        assert objective.eval()(batches[1], 2 * 47).loss.isfinite()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize(("environment", "kept"), [({}, "True"), ({"MALLOC_ARENA_MAX": "2"}, "False")])
def test_freed_memory_is_kept_unless_the_user_has_decided(environment: dict[str, str], kept: str) -> None:
    """Tensors as large as those that were freed find their pages there, most of the time."""
    code = (
        "import resource, torch, dtfcli.loading.devices as d; print(d.keep_freed_memory())\n"
        "pages = 2**24 * 4 // resource.getpagesize()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(32): torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 16 * pages)"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [kept, kept]
