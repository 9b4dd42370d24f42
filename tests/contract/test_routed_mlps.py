"""Routed MLPs: any decoder of Transformers whose layers have an `mlp`, without a list of families."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dtfcli.models.conversion import route_mlps
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.models.modeling_routed_mlp import routed_mlps
from tests.tiny import SHAPE, tokens

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "smollm3",
    "olmo2",
    "granite",
    "gemma3_text",
    "phi3",
    "glm",
    "cohere",
    "starcoder2",
    "stablelm",
    "phi",
    "nemotron",
]
EXPERTS = ["qwen3_moe", "mixtral"]


def dense_model(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{"head_dim": 8, "pad_token_id": None} | SHAPE)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def fitted(dense: PreTrainedModel) -> Any:
    model: Any = route_mlps(dense, capacity=0.6, forecast_maps=2)
    fit_routing(model, [{"input_ids": tokens(8, 40)}])
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_decoder_stays_what_it_is(family: str, tmp_path: Path) -> None:
    """Lossless at γ = 1; cached = chunked = alone = padded; no token sees a later one; reload with three code files."""
    dense = dense_model(family)
    model, ids = fitted(dense), tokens(3, 24, seed=1)
    assert model.routed_layers == [3, 4]
    logits = model(ids).logits
    assert (logits - dense(ids).logits).abs().max() > 1e-3
    with model.routing_mode(capacity=1.0):
        assert torch.equal(model(ids).logits, dense(ids).logits)
    cache = model(ids[:1, :9], use_cache=True).past_key_values
    rest = model(ids[:1, 9:], past_key_values=cache).logits
    assert (rest - logits[:1, 9:]).abs().max() < 1e-4
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 97
    assert (model(changed).logits[:, :12] - logits[:, :12]).abs().max() < 1e-4
    padded, mask = torch.cat([ids[:1, :5], ids[:1]], 1), torch.ones(1, 29, dtype=torch.long)
    mask[:, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert (shifted - logits[:1]).abs().max() < 1e-4
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.py"))) == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert (again(ids).logits - logits).abs().max() < 1e-5  # other addresses, other kernels


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_stays_dense(family: str) -> None:
    assert fitted(dense_model(family)).routed_layers == []


def test_first_tokens_enter_and_shares_are_those_asked_for() -> None:
    model = fitted(dense_model("llama"))
    with model.recorded() as records, torch.no_grad():
        model(tokens(64, 40, seed=2))
    assert {record.layer for record in records} == set(routed_mlps(model))
    for record in records:
        assert record.selected.float().mean() == pytest.approx(0.6, abs=0.05)


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model: Any = route_mlps(dense_model("llama"), capacity=0.6)
    torch.nn.init.constant_(model.model.layers[3].mlp.up_proj.weight, torch.inf)
    with pytest.raises(ValueError, match="layer 3"):
        fit_routing(model, [{"input_ids": tokens(8, 40)}])
