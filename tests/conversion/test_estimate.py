"""`dtf convert --dry-run`: what a conversion takes, from a configuration alone, next to what it really takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.conversion.estimate import peaks
from dtfcli.cost.peak import reset_resident_peak, resident
from dtfcli.models.conversion import route_mlps
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.models.mlp_survey import Text, measure_effects
from tests.conftest import Outcome
from tests.tiny import dense_model, tokens


def test_a_configuration_is_enough(dtf: Callable[..., Outcome], tmp_path: Path) -> None:
    dense = dense_model("llama", intermediate_size=256)
    dense.config.save_pretrained(tmp_path)
    outcome = dtf("convert", str(tmp_path), "--dry-run", "--save", "20%", "--json")
    assert outcome.code == 0, outcome
    account, model = json.loads(outcome.stdout), route_mlps(dense, save=0.2)
    assert account["parameters"] == dense.num_parameters()
    assert account["added_bytes"] == 4 * (model.num_parameters() - dense.num_parameters())
    assert account["saving"] == pytest.approx(0.2, abs=1e-3)
    assert account["routed_layers"] == [3, 4]
    assert account["capacity"] == pytest.approx(model.capacity, abs=1e-3)
    assert [part["name"] for part in account["parts"]] == ["Opening", "Surveying", "Fitting", "Measuring"]
    shown = dtf("convert", str(tmp_path), "--dry-run")
    assert shown.code == 0
    assert "3 to 4" in shown.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-7B", "HuggingFaceTB/SmolLM2-135M"])
def test_known_models_need_no_network(dtf: Callable[..., Outcome], model: str) -> None:
    account = json.loads(dtf("convert", model, "--dry-run", "--json", "--dtype", "bfloat16").stdout)
    assert account["weights_bytes"] == 2 * account["parameters"]
    assert max(part["peak_bytes"] for part in account["parts"]) > account["weights_bytes"] + account["added_bytes"]


@pytest.mark.parametrize("options", [["--to", "mod"], ["--recover", "1M"]])
def test_training_is_not_estimated(dtf: Callable[..., Outcome], tmp_path: Path, options: list[str]) -> None:
    outcome = dtf("convert", str(tmp_path), "--dry-run", *options)
    assert outcome.code == 2
    assert "leave them out" in outcome.stderr


@pytest.mark.skipif(not reset_resident_peak(), reason="the kernel counts no peak here")
def test_the_estimate_is_near_the_peak() -> None:
    """Of this small a model allocators hold as much again; docs/conversion.md has real shapes."""
    shape: Any = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 16_000, "initializer_range": 0.02}
    model: Any = route_mlps(dense_model("llama", **shape), capacity=0.6)
    text = tokens(480, 64)
    measure_effects(model, Text(text[:4], torch.ones(4, 64).bool()))  # libraries allocate what they keep
    reset_resident_peak()
    before = resident("VmRSS")
    fit_routing(model, [{"input_ids": text}])
    counted = peaks(model, 0, text.numel(), torch.float32)
    estimated = max(counted["Surveying"], counted["Fitting"]) - sum(p.nbytes for p in model.parameters())
    assert 0.5 < (resident("VmHWM") - before) / estimated < 3.0
