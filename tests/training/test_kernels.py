"""`training.kernels = "liger"`: which operations go to the library, and that nothing else changes.

Liger's kernels need a GPU; here its two functions are played by torch's, with its signatures. The kernels themselves
are compared in `test_liger_itself`, where they are installed and can run: on a GPU, or in an interpreter of Triton
that knows them (`TRITON_INTERPRET=1`).
"""

import copy
import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dtfcli.errors import ConfigError
from dtfcli.models.conversion import convert
from dtfcli.training import kernels
from dtfcli.training.objectives import Objective
from tests.tiny import ARCHITECTURES, FAMILIES, dense_model, tokens

CAN_RUN = torch.cuda.is_available() or os.environ.get("DTF_LIGER_INTERPRETED") == "1"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of a `liger_kernel` made of torch."""
    called: list[str] = []

    def liger_rms_norm(X: Any, W: Any, eps: float, offset: float, casting_mode: str, in_place: bool) -> Any:
        called.append("norm")
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return torch.nn.functional.rms_norm(X, W.shape, W, eps)

    def liger_swiglu(a: Any, b: Any) -> Any:
        called.append("swiglu")
        return torch.nn.functional.silu(a) * b

    functional: Any = ModuleType("liger_kernel.transformers.functional")
    functional.liger_rms_norm, functional.liger_swiglu = liger_rms_norm, liger_swiglu
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
    model = dense_model(family)
    return model if architecture == "dense" else convert(model, architecture)


@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_feed_forward_blocks_are_ligers(family: str, architecture: str, stand_in: list[str]) -> None:
    model = model_of(family, architecture)
    names = list(model.state_dict())
    expected = losses_and_gradients(copy.deepcopy(model))
    assert stand_in == []  # a copy made before is not changed
    kernels.use_liger(model)
    assert list(model.state_dict()) == names
    for plain, ours in zip(expected, losses_and_gradients(model), strict=True):
        torch.testing.assert_close(ours, plain)
    layers = model.config.num_hidden_layers
    assert stand_in.count("norm") == 2 * layers + 1
    assert stand_in.count("swiglu") == layers
    # A copy made afterwards runs on its own weights.
    again = copy.deepcopy(model)
    torch.nn.init.zeros_(again.model.norm.weight)
    assert not torch.equal(again(tokens(1, 8)).logits, model(tokens(1, 8)).logits)


def test_other_activations_keep_their_own_block(stand_in: list[str]) -> None:
    model = dense_model("llama", hidden_act="gelu")
    kernels.use_liger(model)
    losses_and_gradients(model)
    assert "swiglu" not in stand_in


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    device: Any = SimpleNamespace(type="cuda")
    with pytest.raises(ConfigError, match=r"pip install 'dtfcli\[liger\]'"):
        kernels.check_kernels("liger", device)
    kernels.check_kernels("torch", device)


@pytest.mark.skipif(
    not (CAN_RUN and importlib.util.find_spec("liger_kernel")), reason="Liger's kernels need a GPU or the interpreter"
)
@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
def test_liger_itself(architecture: str) -> None:
    model = model_of("llama", architecture)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    expected = losses_and_gradients(copy.deepcopy(model))
    kernels.use_liger(model)
    for plain, ours in zip(expected, losses_and_gradients(model), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
