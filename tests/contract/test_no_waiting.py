"""How often the host waits for the device; on a GPU each wait leaves it idle.

Training never does between the first layer and the loss, and decoding a token does not. A prompt does once in every
routed layer.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from dtfcli.models.cache import CACHE_NAME
from dtfcli.training.objectives import Objective
from tests.budget import examples
from tests.cases import Batch, Case, batches, every_way, in_chunks, ways_everywhere
from tests.tiny import tokens
from tests.waits import noting_waits


@pytest.fixture
def blind(case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model of a case, whose layers do not synchronize with the device."""
    model = case.on(device)
    monkeypatch.setattr(model.model, "syncs", False)
    return model


def test_the_watch_sees_what_it_should() -> None:
    x = torch.arange(3.0)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.cpu(),
    ):
        with noting_waits(x.device) as places:
            wait()
        assert places
    with noting_waits(x.device) as places:
        torch.where(x > 1, x, 0.0).topk(2).indices.sum()
    assert places == []


@pytest.mark.gpu
def test_the_watch_sees_what_it_should_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("only a GPU is waited for")
    x = torch.ones(3, device="cuda")
    with noting_waits(x.device) as places:
        x.sum().item()
        bool(x.any())
        torch.ones(3).to("cuda")
        torch.where(x > 1, x, 0.0).topk(2).indices.sum()
    assert len(places) == 3


@ways_everywhere
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_does_not_wait(case: Case, device: torch.device, checkpointing: bool) -> None:
    """Forward, loss and backward, in micro-batches, with what is logged."""
    model = case.fresh(**{"explore": 0.25} if case.learns_updates else {}).to(device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective, ids = Objective(model).train(), tokens(4, 32).to(device)

    def step(rows: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = objective(rows, 4 * 31, output_routing=True)
        losses.loss.backward()

    step(ids[:2])
    with noting_waits(device) as places:
        for rows in ids.split(2):
            step(rows)
    assert places == []


@ways_everywhere
@torch.no_grad()
def test_a_prompt_waits_once_a_layer(blind: Any, device: torch.device) -> None:
    """For its number of slots; a mask is read once, too."""
    for rows, masked in ((2, False), (1, True), (2, True)):
        ids = tokens(rows, 40).to(device)
        how: dict[str, Any] = {"use_cache": True, "attention_mask": torch.ones_like(ids) if masked else None}
        blind(ids, **how)
        with noting_waits(device) as places:
            blind(ids, **how)
        assert len(places) <= len(blind.model.routed) + masked, places


@ways_everywhere
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_decoding_does_not_wait(blind: Any, device: torch.device, rows: int) -> None:
    """With a mask or without one; the first token after a prompt reserves slots for the next 31."""
    ids = tokens(rows, 60).to(device)
    mask = torch.ones_like(ids)
    for masked in (False, True):
        seen = [{"attention_mask": mask[:, :end]} if masked else {} for end in range(30)]
        cache = blind(ids[:, :20], use_cache=True, **seen[20])[CACHE_NAME]
        blind(ids[:, 20:21], **seen[21], **{CACHE_NAME: cache})
        with noting_waits(device) as places:
            for n in range(21, 27):
                blind(ids[:, n : n + 1], **seen[n + 1], **{CACHE_NAME: cache})
        assert places == []


@every_way
@given(batch=batches())
@settings(max_examples=examples(6))
def test_synchronizing_changes_nothing(case: Case, batch: Batch) -> None:
    """Padding on the left, chunks: the same logits, the same cache."""
    model, mask = case.on(), batch.mask.cummax(1).values  # what is cached has no padding on the right
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "syncs", True)
        expected, its = in_chunks(model, batch.input_ids, mask, batch.cuts)
        patch.setattr(model.model, "syncs", False)
        logits, cache = in_chunks(model, batch.input_ids, mask, batch.cuts)
    assert (logits - expected)[mask.bool()].abs().max() <= 1e-5
    assert cache.routed_shares == its.routed_shares
    assert cache.nbytes == its.nbytes


@every_way
@torch.no_grad()
def test_changing_a_cache_whose_counts_only_the_device_knows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams, cropped tokens and more of them."""
    model, ids = case.on(), tokens(2, 90)
    results = []
    for syncs in (True, False):
        monkeypatch.setattr(model.model, "syncs", syncs)
        _, cache = in_chunks(model, ids[:, :45], None, list(range(40, 45)))
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0]))
        for n in range(42, 88):
            logits = model(ids.flip(0)[:, n : n + 1], **{CACHE_NAME: cache}).logits
        results.append((logits, cache.routed_shares))
    assert (results[0][0] - results[1][0]).abs().max() <= 1e-5
    assert results[0][1] == results[1][1]
