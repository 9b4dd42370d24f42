"""Nothing lost on load: every weight arrives, or loading fails."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtfcli.models.configuration_dynamic import CONFIGS, DynamicLlamaConfig
from dtfcli.models.conversion import load_dense
from dtfcli.models.families import FAMILIES
from dtfcli.models.modeling_dynamic import MODELS, DynamicLlamaForCausalLM
from dtfcli.models.pretrained import is_added
from tests.tiny import EVERY_ARCHITECTURE, dense_model, routed_model


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


def change(folder: Path, lost: str | None = None, new: str | None = None) -> None:
    """Take a tensor out of a folder's weights, or put a new one in."""
    weights = load_file(folder / "model.safetensors")
    if lost:
        del weights[lost]
    if new:
        weights[new] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


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
    change(tmp_path, lost)
    with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
        type(model).from_pretrained(tmp_path)


def test_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    model = routed_model()
    model.save_pretrained(tmp_path)
    change(tmp_path, new="model.layers.0.router.beta_ce")
    with pytest.raises(ValueError, match=r"layers\.0\.router\.beta_ce"):
        type(model).from_pretrained(tmp_path)


def test_a_backbone_key_that_a_dense_checkpoint_lacks_is_an_error(tmp_path: Path) -> None:
    """For a routed class, and for a dense base."""
    lost = "model.layers.3.self_attn.q_proj.weight"
    dense_model().save_pretrained(tmp_path)
    change(tmp_path, lost)
    with pytest.raises(ValueError, match="q_proj"):
        DynamicLlamaForCausalLM.from_pretrained(tmp_path, config=DynamicLlamaConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=rf"missing: {lost}".replace(".", r"\.")):
        load_dense(tmp_path)


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
