"""`import dtfcli` registers the Auto classes, whatever is imported first, and does not import Transformers for it."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import dtfcli
from tests.tiny import SHAPE, routed_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without the code files that Transformers would load instead."""
    folder = tmp_path_factory.mktemp("model")
    model = routed_model("qwen2")
    model.config.auto_map = None
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_auto_classes_open_routed_mlps_of_any_decoder(family: str, tmp_path: Path) -> None:
    """Their classes are made when they are asked for."""
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{"head_dim": 8} | SHAPE))
    model = dtfcli.route_mlps(stock)
    model.config.auto_map = None
    PreTrainedModel.save_pretrained(model, tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == f"Routed{type(stock.model).__name__}"
    with pytest.raises(ValueError, match="Unrecognized model identifier: routed_nothing"):
        AutoConfig.for_model("routed_nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM; import dtfcli",
        "from dtfcli.models.configuration_dynamic import DynamicLlamaConfig",
    ],
)
def test_auto_classes_open_a_routed_model(folder: Path, first: str) -> None:
    code = f"""
{first}
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained({str(folder)!r})
print(type(config).__module__, type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__module__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["dtfcli.models.configuration_dynamic", "dtfcli.models.modeling_dynamic"]


def test_the_public_api_is_there() -> None:
    for name in dtfcli.__all__:
        assert getattr(dtfcli, name) is not None
    assert set(dir(dtfcli)) == set(dtfcli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = dtfcli.trian
