"""`dtf bench`: its report is whole, and compiled steps are the eager ones."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dtfcli.bench.report import BenchOptions
from dtfcli.bench.steps import bench_training
from dtfcli.models.conversion import convert
from dtfcli.training.compiling import compile_layers
from dtfcli.training.objectives import Objective
from tests.conftest import Outcome
from tests.tiny import ARCHITECTURES, dense_model, tokens

Dtf = Callable[..., Outcome]
SHAPE = ["model.scratch.hidden_size=64", "model.scratch.intermediate_size=96", "model.scratch.num_hidden_layers=4"]
BENCH = ["bench", "quickstart", *SHAPE, "--device", "cpu", "--seq-len", "32", "--repeats", "2"]


def test_report(dtf: Dtf) -> None:
    given = "--capacities 0.5,0.25 --stock --threads 1 --new-tokens 3 --calibration-tokens 64 --json"
    result = dtf(*BENCH, *given.split())
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    steps = {(step["architecture"], step["capacity"]): step for step in report["training"]}
    routed = [(architecture, capacity) for architecture in ARCHITECTURES for capacity in (0.25, 0.5)]
    assert set(steps) == {("dense", 1.0), ("stock", 1.0), *routed}
    assert {entry["phase"] for entry in report["results"]} == {"prefill", "decode"}
    assert report["threads"] == 1
    assert steps["dense", 1.0]["time_ratio"] == steps["dense", 1.0]["flop_ratio"] == 1.0
    for architecture in ARCHITECTURES:
        assert steps[architecture, 0.25]["flop_ratio"] < steps[architecture, 0.5]["flop_ratio"] < 1.0
    for step in steps.values():
        assert min(step["step_ms"], step["optimizer_ms"]) > 0
        assert step["tokens_per_second"] == pytest.approx(32e3 / step["step_ms"])
        assert step["peak_bytes"] is None or step["peak_bytes"] > 0


def test_weights_stay_and_gradients_go() -> None:
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    routed = {name: convert(dense, name) for name in ARCHITECTURES}
    bench_training(dense, routed, BenchOptions(capacities=[0.5], seq_len=16, repeats=1), print)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"architecture": "dtf", "gate": "soft"}),
        ("qwen2", {"architecture": "dtf", "gate": "straight_through"}),
        ("qwen2", {"architecture": "mod", "gate": "soft"}),
        ("llama", {"architecture": "dtf", "score": "forecast_error", "bypass": "forecast"}),
    ],
)
def test_compiled_layers_are_the_eager_ones(family: str, fields: dict[str, Any]) -> None:
    """No graph break in any layer (`fullgraph` makes one an error), no second compilation, equal values."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model: Any = convert(dense_model(family), **fields) if fields else dense_model(family)
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
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if fields else 1)

    # What has no fixed shapes still runs, as it did.
    if fields:
        model.calibrate([{"input_ids": batches[0]}], capacities=())
        model.set_training_routing("threshold")
        objective(batches[0], 2 * 47).loss.backward()
    with torch.no_grad():
        assert objective.eval()(batches[1], 2 * 47).loss.isfinite()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_unless_the_user_has_decided() -> None:
    """Tensors as large as those that were freed find their pages there, most of the time."""
    code = """
import os, resource, torch
from dtfcli.loading.devices import keep_freed_memory
for decided in (True, False):
    os.environ.pop("MALLOC_ARENA_MAX") if not decided else os.environ.update(MALLOC_ARENA_MAX="2")
    print(keep_freed_memory())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(32): torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 16 * 2**26 // resource.getpagesize())
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    child = subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["False", "False", "True", "True"]
