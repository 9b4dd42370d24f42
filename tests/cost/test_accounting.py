"""Parameters and FLOPs of a model, counted before it runs."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from dtfcli.cost.accounting import describe, forward_flops_per_token, training_step_flops
from dtfcli.loading.build import build_model
from dtfcli.models.conversion import convert
from dtfcli.models.pretrained import is_added
from dtfcli.settings import load_settings
from dtfcli.settings.sources import preset_names
from dtfcli.training.objectives import Objective
from tests.tiny import ARCHITECTURES, FAMILIES, dense_model, routed_model, tokens

BILLIONS = {"smollm2-135m": 0.1345, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.544, "qwen2.5-7b": 7.616}
"""Published sizes of the base models."""


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_builds_on_the_meta_device(preset: str) -> None:
    settings = load_settings(preset)
    model = build_model(settings, meta=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    account = describe(model, seq_len=settings.data.seq_len, micro_batch_size=1, dtype="bfloat16", checkpointing=False)
    choosing = sum(
        p.numel() for name, p in model.named_parameters() if name.endswith(("mlp.router.weight", ".centers"))
    )
    assert account.trainable_parameters == account.parameters - choosing > 1e6
    assert (account.new_parameters == 0) == (settings.model.architecture == "dense")
    assert account.share_of_dense == 1.0 if settings.model.architecture == "dense" else account.share_of_dense < 1.0
    backbone = (account.parameters - account.new_parameters) / 1e9
    assert BILLIONS.get(preset.partition("-")[2], backbone) == pytest.approx(backbone, rel=1e-3)


FORECAST = {"bypass": "forecast", "score": "forecast_error"}
CASES: list[tuple[str, float, dict[str, Any]]] = [
    ("dense", 1.0, {}),
    *((architecture, share, {}) for architecture in ARCHITECTURES for share in (0.5, 0.125)),
    *((architecture, 0.5, {"kv_tokens": "all"}) for architecture in ARCHITECTURES),
    ("layerdrop", 0.5, {"bypass": "forecast"}),
    ("dtf", 0.25, FORECAST),
    ("dtf", 0.25, FORECAST | {"kv_tokens": "all", "explore": 0.0}),
    ("dtf", 0.25, FORECAST | {"kv_tokens": "all", "explore": 0.5}),
]
WIDTH = {"hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize(("architecture", "capacity", "fields"), CASES)
def test_flops_are_those_that_torch_counts(architecture: str, capacity: float, fields: dict[str, Any]) -> None:
    """Forward to 1 %: the formula leaves out nothing but matrix products that are none. With backward to 3 %."""
    for family in FAMILIES:
        model: Any = dense_model(family)
        if architecture != "dense":
            model = routed_model(family, architecture, capacity, **fields)
            model.set_routing("topk")
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=tokens(1, 64), use_cache=False)
        assert forward_flops_per_token(model, 64) * 64 == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert flops_over_torchs(model) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("kv_tokens", ["routed", "all"])
@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
def test_flops_of_a_frozen_backbone(architecture: str, kv_tokens: str) -> None:
    """As LoRA has it: no products for the gradients of frozen weights. Below the first trained one, none for inputs."""
    model: Any = dense_model("llama", num_hidden_layers=12, **WIDTH)
    if architecture != "dense":
        model = convert(model, architecture, kv_tokens=kv_tokens)
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name))
    low_rank = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    inject_adapter_in_model(low_rank, model)
    assert flops_over_torchs(model) == pytest.approx(1, rel=0.03)


def flops_over_torchs(model: Any) -> float:
    """What is counted for a training step, over what torch counts while one runs."""
    rows, length = 2, 64
    objective = Objective(model).train()
    with FlopCounterMode(display=False) as counter:
        objective(tokens(rows, length), rows * (length - 1)).loss.backward()
    return training_step_flops(model, length) * rows * length / counter.get_total_flops()
