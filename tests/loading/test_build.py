"""Building models from settings and bases."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from dtfcli.errors import ConfigError
from dtfcli.loading.build import build_model, build_tokenizer
from dtfcli.models.pretrained import is_added
from dtfcli.settings import Settings
from tests.tiny import FAMILIES
from tests.training.small_runs import small_settings

ARCHITECTURES = ("dtf", "mod", "dense")


def with_base(folder: Path, base: Path, architecture: str = "dtf", **model: object) -> Settings:
    """Settings that start from `base`."""
    values = small_settings(folder, architecture).model_dump(exclude_none=True)
    del values["model"]["scratch"]
    values["model"] |= {"base": str(base), **model}
    return Settings.model_validate(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_architectures_share_the_backbone_of_a_seed(tmp_path: Path, family: str) -> None:
    models = {
        name: build_model(small_settings(tmp_path, name, model={"scratch": {"family": family}}))
        for name in ARCHITECTURES
    }
    backbone = models["dense"].state_dict()
    assert type(models["dense"]) is {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family]
    for name in ("dtf", "mod"):
        state = models[name].state_dict()
        assert {key for key in state if not is_added(key)} == set(backbone)
        assert all(torch.equal(state[key], backbone[key]) for key in backbone)
        assert models[name].dtype == torch.float32


def test_seeds(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    one, again, other = (build_model(small_settings(tmp_path, run={"seed": seed})).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    # By their bits: thresholds are NaN until they are calibrated.
    assert all(torch.equal(one[name].nan_to_num(), again[name].nan_to_num()) for name in one)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.prior.w_in.weight"):
        assert not torch.equal(one[name], other[name])


def test_scratch_model_fits_its_tokenizer(tmp_path: Path) -> None:
    settings = small_settings(tmp_path)
    tokenizer = build_tokenizer(settings)
    model = build_model(settings, tokenizer=tokenizer)
    assert model.config.vocab_size == len(tokenizer) <= settings.model.scratch.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().padding_idx is None
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_settings_reach_the_model(tmp_path: Path) -> None:
    fields = {"capacity": 0.25, "dense_edges": 0, "routed_layers": [1], "sink_tokens": 2}
    settings = small_settings(tmp_path, model={**fields, "attn_implementation": "eager"})
    config = build_model(settings).config
    assert (config.capacity, config.routed_layer_indices, config.sink_tokens) == (0.25, [1], 2)
    assert config._attn_implementation == "eager"
    assert config.rope_parameters["rope_theta"] == settings.model.scratch.rope_theta


def test_base_folder_is_converted(folder: Path, tmp_path: Path) -> None:
    dense = load_file(folder / "dense" / "model.safetensors")
    for architecture in ARCHITECTURES:
        state = build_model(with_base(tmp_path, folder / "dense", architecture)).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in dense.items())


def test_routed_base_goes_on_as_it_is(folder: Path, tmp_path: Path) -> None:
    base = folder / "outputs" / "2026-01-01" / "mine"
    model = build_model(with_base(tmp_path, base))
    saved = load_file(base / "final_model" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    with pytest.raises(ConfigError, match=r"is a dtf model: train it with model=dtf"):
        build_model(with_base(tmp_path, base, "mod"))
    with pytest.raises(ConfigError, match=r"model\.capacity = 0\.5.*has 0\.25"):
        build_model(with_base(tmp_path, base, capacity=0.5))


def test_fields_that_do_not_fit_the_base(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"routed_layers.*0 to 5"):
        build_model(with_base(tmp_path, folder / "dense", routed_layers=[1, 9]))


def test_tokenizer_larger_than_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(small_settings(tmp_path))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = with_base(tmp_path, folder / "dense").model_dump(exclude_none=True)
    values["data"]["tokenizer"] = str(tmp_path / "tokenizer")
    settings = Settings.model_validate(values)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .* tokens, the model's vocabulary 97"):
        build_model(settings, tokenizer=build_tokenizer(settings))
