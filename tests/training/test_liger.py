"""`training.kernels = "liger"`: which operations go to the library, and that nothing else changes.

Liger's kernels need a GPU; here its three functions are played by torch's, with its signatures. `tests/gpu` compares
the kernels themselves.
"""

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dtfcli.errors import ConfigError
from dtfcli.models.conversion import convert
from dtfcli.models.families import FAMILIES
from dtfcli.training import liger
from dtfcli.training.objectives import Objective
from tests.tiny import dense_model, tokens


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of a `liger_kernel` made of torch."""
    called: list[str] = []

    def liger_rms_norm(X: Any, W: Any, eps: float, offset: float, casting_mode: str, in_place: bool) -> Any:
        called.append("norm")
        assert not in_place
        x = X.float() * torch.rsqrt(X.float().pow(2).mean(-1, keepdim=True) + eps)
        if casting_mode == "llama":
            return x.to(X.dtype) * (offset + W)
        assert casting_mode == "gemma"
        return (x * (offset + W.float())).to(X.dtype)

    def liger_swiglu(a: Any, b: Any) -> Any:
        called.append("swiglu")
        return torch.nn.functional.silu(a) * b

    def liger_geglu(a: Any, b: Any) -> Any:
        called.append("geglu")
        return torch.nn.functional.gelu(a, approximate="tanh") * b

    functional: Any = ModuleType("liger_kernel.transformers.functional")
    for function in (liger_rms_norm, liger_swiglu, liger_geglu):
        setattr(functional, function.__name__, function)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    return called


def losses_and_gradients(model: Any) -> list[torch.Tensor]:
    objective = Objective(model).train()
    loss = objective(tokens(2, 24), 2 * 23).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def model_of(family: str, architecture: str) -> Any:
    """A small model whose norms have weights unlike those that they start with."""
    model = dense_model(family)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model if architecture == "dense" else convert(model, architecture)


def norms_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize(
    ("family", "architecture"), [*((name, "dtf") for name in FAMILIES), ("llama", "dense"), ("llama", "mod")]
)
def test_norms_and_feed_forward_blocks_are_ligers(family: str, architecture: str, stand_in: list[str]) -> None:
    model = model_of(family, architecture)
    names = list(model.state_dict())
    expected = losses_and_gradients(copy.deepcopy(model))
    assert stand_in == []  # a copy made before is not changed
    assert liger.use_liger(model) == []
    assert list(model.state_dict()) == names
    for plain, ours in zip(expected, losses_and_gradients(model), strict=True):
        torch.testing.assert_close(ours, plain)
    layers = model.config.num_hidden_layers
    assert stand_in.count("norm") == len(norms_of(model)) > 2 * layers
    assert stand_in.count("geglu" if family == "gemma3_text" else "swiglu") == layers
    # A copy made afterwards runs on its own weights.
    again = copy.deepcopy(model)
    torch.nn.init.zeros_(again.model.norm.weight)
    assert not torch.equal(again(tokens(1, 8)).logits, model(tokens(1, 8)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_round_where_the_family_does(family: str, stand_in: list[str]) -> None:
    """In bfloat16 the order of multiplying and rounding shows; in float32 it does not."""
    model = model_of(family, "dense").bfloat16()
    stock = [copy.deepcopy(norm) for norm in norms_of(model)]
    liger.use_liger(model)
    for norm, plain in zip(norms_of(model), stock, strict=True):
        x = torch.randn(2, 8, len(norm.weight), dtype=torch.bfloat16)
        assert torch.equal(norm(x), plain(x))
    assert stand_in.count("norm") == len(stock)


def test_other_activations(stand_in: list[str]) -> None:
    """GEGLU runs in any family; a block with another activation stays as it is."""
    model = dense_model("llama", hidden_act="gelu")
    assert liger.use_liger(model) == ["LlamaMLP with gelu"]
    losses_and_gradients(model)
    assert set(stand_in) == {"norm"}
    model = dense_model("llama", hidden_act="gelu_pytorch_tanh")
    expected = losses_and_gradients(copy.deepcopy(model))
    assert liger.use_liger(model) == []
    for plain, ours in zip(expected, losses_and_gradients(model), strict=True):
        torch.testing.assert_close(ours, plain)
    assert "geglu" in stand_in


def test_a_model_without_anything_for_it() -> None:
    with pytest.raises(ConfigError, match=r"no kernel for any block of this model \(Sequential\); leave it at 'torch'"):
        liger.use_liger(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    device: Any = SimpleNamespace(type="cuda")
    with pytest.raises(ConfigError, match=r"pip install 'dtfcli\[liger\]'"):
        liger.check_liger("liger", device)
    liger.check_liger("torch", device)
