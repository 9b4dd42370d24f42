"""Which attention runs on a GPU, by torch's profiler: flash or cuDNN's, never the one that writes all scores out."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dtfcli.models.conversion import convert
from dtfcli.training.objectives import Objective
from tests.tiny import dense_model, tokens

pytestmark = pytest.mark.gpu

FAST = ("flash", "cudnn")
FUSED = (*FAST, "efficient")
"""With a mask flash attention does not run; the memory-efficient one does."""
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dtf": {"architecture": "dtf"},
    "mod": {"architecture": "mod"},
    "forecast error": {"score": "forecast_error", "bypass": "forecast"},
}
EVERY_KEY = {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"}


def build(fields: dict[str, Any], device: torch.device) -> Any:
    """Four layers with heads of a real size."""
    model: Any = dense_model("qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    model = model.to(device)
    if fields:
        model = convert(model, **fields)
        model.calibrate([{"input_ids": tokens(4, 128)}], capacities=())
    return model


def attention_of(work: Callable[[], Any], device: torch.device) -> tuple[set[str], set[str]]:
    """Names of the attention operations behind sdpa in some work, and of the kernels on the device."""
    work()  # what the first call alone does is not of interest
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    rows = recorded.key_averages()
    names = {row.key for row in rows if row.key.startswith("aten::_scaled_dot_product")}
    return names, {row.key for row in rows if row.device_type.name == "CUDA"}


def assert_kinds(names: set[str], kinds: tuple[str, ...]) -> None:
    assert names
    strangers = {name for name in names if not any(kind in name for kind in kinds)}
    assert not strangers, strangers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_prefill(name: str, masked: bool, device: torch.device) -> None:
    """With a mask of ones, too: `generate` always gives one."""
    model = build(MODELS[name], device).to(torch.bfloat16)
    ids = tokens(1, 256).to(device)
    mask = torch.ones_like(ids) if masked else None
    names, kernels = attention_of(lambda: model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1), device)
    assert_kinds(names, FAST)
    assert device.type == "cpu" or any(kind in kernel.lower() for kernel in kernels for kind in FAST)


@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, device: torch.device) -> None:
    """Float32 weights under bfloat16 autocast, as `dtf train` runs them; forward and backward."""
    objective, ids = Objective(build(MODELS[name], device)).train(), tokens(2, 256).to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(ids, 2 * 255).loss
        loss.backward()

    names, kernels = attention_of(step, device)
    assert_kinds(names, FAST)
    assert any("backward" in name for name in names)
    assert device.type == "cpu" or any(kind in kernel.lower() for kernel in kernels for kind in FAST)


def test_where_every_key_is_offered(device: torch.device) -> None:
    """Routed tokens attend to all earlier ones by a mask: fused kernels all the same."""
    model = build(EVERY_KEY, device)
    half, ids = copy.deepcopy(model).to(torch.bfloat16), tokens(2, 256).to(device)
    with torch.no_grad():
        names, _ = attention_of(lambda: half(ids, use_cache=True, logits_to_keep=1), device)
    assert_kinds(names, FUSED)
    objective = Objective(model).train()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(ids, 2 * 255).loss
        loss.backward()

    names, _ = attention_of(step, device)
    assert_kinds(names, FUSED)
