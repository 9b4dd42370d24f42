"""Nothing lost on load: every weight arrives, or loading fails; a saved model opens without `dtfcli`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtfcli.models.configuration_dynamic import CONFIGS, DynamicLlamaConfig
from dtfcli.models.conversion import load_dense
from dtfcli.models.families import FAMILIES
from dtfcli.models.modeling_dynamic import MODELS, DynamicLlamaForCausalLM
from dtfcli.models.pretrained import is_added
from tests.tiny import EVERY_ARCHITECTURE, dense_model, routed_model, tokens
from tests.tiny import FAMILIES as TINY_FAMILIES


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_dense_checkpoint_loads_into_the_routed_class(family: str, architecture: str, tmp_path: Path) -> None:
    dense = dense_model(family)
    dense.save_pretrained(tmp_path)
    config = CONFIGS[family].from_pretrained(tmp_path, architecture=architecture)
    routed, info = MODELS[family].from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert bool(info["missing_keys"]) == (architecture != "layerdrop")
    assert all(is_added(key) for key in info["missing_keys"])
    for name, tensor in dense.state_dict().items():
        assert torch.equal(routed.state_dict()[name], tensor), name
    for name, parameter in routed.named_parameters():
        assert parameter.isfinite().all(), name


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.1.router.beta_ce",
        "model.layers.1.router.thresholds",
        "model.layers.0.prior.w_out.weight",
        "model.norm.weight",
    ],
)
def test_a_key_that_is_missing_from_a_routed_checkpoint_is_an_error(lost: str, tmp_path: Path) -> None:
    model = routed_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
        type(model).from_pretrained(tmp_path)


def test_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    model = routed_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.router.beta_ce"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.router\.beta_ce"):
        type(model).from_pretrained(tmp_path)


def test_a_backbone_key_that_a_dense_checkpoint_lacks_is_an_error(tmp_path: Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="q_proj"):
        DynamicLlamaForCausalLM.from_pretrained(tmp_path, config=DynamicLlamaConfig.from_pretrained(tmp_path))


def test_a_dense_base_that_lacks_a_weight_is_an_error(tmp_path: Path) -> None:
    dense_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.3\.self_attn\.q_proj\.weight"):
        load_dense(tmp_path)


READER = """
import sys, json, torch
sys.modules["dtfcli"] = None  # importing it fails
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
logits = model(torch.load(folder + "/ids.pt", weights_only=True)).logits
torch.save(logits.detach(), folder + "/logits.pt")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
generator = pipeline("text-generation", model=folder, tokenizer=tokenizer, trust_remote_code=True)
print(json.dumps(generator("a b c", max_new_tokens=4, do_sample=False)[0]["generated_text"]))
"""


def read_elsewhere(model: Any, tokenizer: Any, place: Path) -> str:
    """Save a model, open it in a process without dtfcli, compare logits bit for bit; returns what it wrote."""
    folder, input_ids = place / "model", tokens(3, 33)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(input_ids, folder / "ids.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READER, str(folder)], capture_output=True, text=True, env=environment, cwd=place
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with torch.no_grad():
        assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), model(input_ids).logits)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_opens_in_a_process_without_dtfcli(family: str, architecture: str, tmp_path: Path, word_tokenizer) -> None:
    model = routed_model(family, architecture)
    written = read_elsewhere(model, word_tokenizer, tmp_path)
    prompt = word_tokenizer("a b c", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, 3:]
    assert written == "a b c" + word_tokenizer.decode(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_stay_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = routed_model()
    thresholds = {i: router.thresholds.clone() for i, router in model.model.routers.items()}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    cast = model.to(dtype)
    for changed in (loaded, cast):
        assert changed.dtype == dtype
        for index, router in changed.model.routers.items():
            assert torch.equal(router.thresholds, thresholds[index])
            assert all(parameter.dtype == torch.float32 for parameter in router.parameters())
