"""Steps of training on a GPU: precision, exploration, batches and kernels."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from dtfcli.training.liger import use_liger
from dtfcli.training.validation import to_batch
from tests.cases import Case, every_way
from tests.gpu.cases import assert_alike, build, losses_and_gradients
from tests.tiny import dense_model, tokens

pytestmark = pytest.mark.gpu


@every_way
def test_a_step_is_the_cpus(case: Case, device: torch.device) -> None:
    """Loss and gradients in float32; nothing is explored, because devices draw other numbers."""
    its = case.fresh(explore=0.0) if case.learns_updates else case.fresh()
    model = copy.deepcopy(its).to(device)
    ids = tokens(2, 40, 6)
    expected, found = losses_and_gradients(its, ids), losses_and_gradients(model, ids.to(device))
    assert_alike(found, expected, 1e-3)


@every_way
def test_a_step_in_bfloat16(case: Case, device: torch.device) -> None:
    """The loss is about that of float32, and whatever routing adds learns."""
    model = case.fresh(**{"explore": 0.5} if case.learns_updates else {})
    ids = tokens(2, 40, 6).to(device)
    exact = losses_and_gradients(copy.deepcopy(model).to(device), ids)
    found = losses_and_gradients(model.to(device), ids, torch.bfloat16)
    assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.1)
    assert all(gradient.isfinite().all() for gradient in found.values())
    for added in ("router", "prior", "forecast"):
        names = [name for name, _ in model.named_parameters() if added in name]
        kept = {layer for layer, share in model.config.layer_capacities().items() if share}
        names = [name for name in names if added == "forecast" or added == "prior" or int(name.split(".")[2]) in kept]
        assert all(name in found for name in names), added


def test_the_same_seed_explores_the_same_tokens(device: torch.device) -> None:
    model, ids = build("forecast error", explore=0.3).to(device).train(), tokens(2, 40).to(device)
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(torch.stack([record.weight for record in model(ids, output_routing=True).routing]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_rows_become_batches_on_the_device(device: torch.device, tmp_path: Path) -> None:
    """From a memory map, as the loop reads them; ids that are no targets are stored as their complement."""
    file = np.memmap(tmp_path / "rows", np.int32, "w+", shape=(4, 6))
    file[:] = np.arange(24).reshape(4, 6)
    file[:, :2] = ~file[:, :2]
    ids, labels = to_batch(file[1:3], device)
    expected = torch.arange(6, 18).view(2, 6)
    assert ids.device.type == labels.device.type == device.type
    assert torch.equal(ids.cpu(), expected)
    expected[:, :2] = -100
    assert torch.equal(labels.cpu(), expected)


@pytest.mark.parametrize("kind", ["dense", "surprise", "mod"])
def test_liger_says_the_same(kind: str, on_gpu: None, device: torch.device) -> None:
    pytest.importorskip("liger_kernel", reason="these are its kernels")
    model = (dense_model() if kind == "dense" else build(kind)).to(device)
    ids = tokens(2, 24).to(device)
    expected = losses_and_gradients(copy.deepcopy(model), ids)
    use_liger(model)
    assert_alike(losses_and_gradients(model, ids), expected, 1e-3)
