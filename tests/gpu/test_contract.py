"""The promises about models on a GPU, against the CPU's results with the same weights: lossless, causal, cached."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.models.conversion import convert, to_dense
from dtfcli.models.routing import topk_capacity
from tests.gpu.cases import CASES, LENGTHS, LOOKS, every_case, in_chunks, on_device, padded_rows, reference, settled
from tests.near import near_tie
from tests.tiny import FAMILIES, VOCABULARY, dense_model, tokens

pytestmark = pytest.mark.gpu

CHUNKS = (5, 6, 7, 20)


@every_case
@torch.no_grad()
def test_capacity_one_is_the_dense_model_and_back(case: str, device: torch.device) -> None:
    """Converted where the dense model is; and the dense model is the CPU's."""
    _, input_ids, mask = padded_rows()
    for family in FAMILIES:
        dense = dense_model(family)
        expected = dense(input_ids, attention_mask=mask).logits
        dense = dense.to(device)
        ids, seen = input_ids.to(device), mask.to(device)
        theirs = dense(ids, attention_mask=seen).logits
        assert (theirs.cpu() - expected)[mask.bool()].abs().max() <= 1e-4
        routed = convert(dense, capacity=1.0, **CASES[case] | {"gate": "straight_through"})
        assert {tensor.device.type for tensor in routed.state_dict().values()} == {device.type}
        for mode in ("threshold", "topk"):
            with routed.routing_mode(mode):
                assert (routed(ids).logits - dense(ids).logits).abs().max() <= 1e-4
                assert (routed(ids, attention_mask=seen).logits - theirs)[seen.bool()].abs().max() <= 1e-4
        back = to_dense(routed).state_dict()
        assert all(torch.equal(tensor, back[name]) for name, tensor in dense.state_dict().items())


@every_case
@torch.no_grad()
def test_alone_together_cached_and_chunked_are_what_the_cpu_says(
    case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several lengths, padded on either side; whether layers look at how many tokens enter or not.

    The other tests leave that to the model.
    """
    model, its = on_device(case, device), reference(case)
    alone, input_ids, mask = padded_rows()
    compared = settled(its, alone)
    expected = [its(row, use_cache=False).logits[0] for row in alone]
    ids, seen = input_ids.to(device), mask.to(device)
    for looks in (True, False):
        monkeypatch.setattr(model.model, "looks", looks)
        found = {
            "together": model(ids, attention_mask=seen, use_cache=False).logits,
            "cached": model(ids, attention_mask=seen, use_cache=True).logits,
            "chunked": in_chunks(model, ids, seen, CHUNKS),
        }
        for place in compared:
            row, real = alone[place].to(device), mask[place].bool()
            logits = {how: by[place].cpu()[real] for how, by in found.items()}
            logits |= {"alone": model(row, use_cache=False).logits[0].cpu()}
            logits |= {"alone, chunked": in_chunks(model, row, None, CHUNKS)[0].cpu()}
            for how, ours in logits.items():
                assert (ours - expected[place]).abs().max() <= 1e-4, (looks, how, place)


@every_case
@torch.no_grad()
def test_topk_takes_the_tokens_that_the_cpu_takes(case: str, device: torch.device) -> None:
    model, its = on_device(case, device), reference(case)
    alone, input_ids, mask = padded_rows()
    with model.routing_mode("topk"), its.routing_mode("topk"):
        out = model(input_ids.to(device), attention_mask=mask.to(device), output_routing=True)
        expected = its(input_ids, attention_mask=mask, output_routing=True)
        compared = settled(its, alone)
    for ours, theirs in zip(out.routing, expected.routing, strict=True):
        assert torch.equal(ours.selected[compared].cpu(), theirs.selected[compared])
        if CASES[case].get("architecture") != "layerdrop":
            assert ours.selected.sum(1).tolist() == [topk_capacity(0.5, length) for length in LENGTHS]
    for place in compared:
        assert (out.logits[place].cpu() - expected.logits[place])[mask[place].bool()].abs().max() <= 1e-4


@every_case
@torch.no_grad()
def test_no_look_at_the_future(case: str, device: torch.device) -> None:
    """Ten rows, each changed from a place of its own."""
    model, ids = on_device(case, device), tokens(10, 40, seed=3).to(device)
    changed = torch.arange(3, 40, 4, device=device)
    later = torch.arange(40, device=device) >= changed.unsqueeze(1)
    other = torch.where(later, (ids + 1) % VOCABULARY, ids)
    safe = [not near_tie(reference(case), row.unsqueeze(0)) for row in ids.cpu()]
    assert sum(safe) >= 5
    difference = (model(ids).logits - model(other).logits).abs().amax(-1)
    assert difference[~later & torch.tensor(safe, device=device).unsqueeze(1)].max() <= 1e-4
    assert difference[later].max() > 1e-2


@every_case
@torch.no_grad()
def test_saved_and_loaded(case: str, device: torch.device, tmp_path: Path) -> None:
    """From the device, to the CPU and straight to the device."""
    model, ids = on_device(case, device), tokens(3, 33)
    model.save_pretrained(tmp_path)
    expected = model(ids.to(device)).logits
    there = type(model).from_pretrained(tmp_path, device_map={"": str(device)})
    assert there.device.type == device.type
    assert (there(ids.to(device)).logits - expected).abs().max() <= 1e-5
    here = type(model).from_pretrained(tmp_path)
    compared = settled(here, list(ids.split(1)))
    assert (here(ids).logits - expected.cpu())[compared].abs().max() <= 1e-4


@every_case
@torch.no_grad()
def test_bfloat16(case: str, device: torch.device) -> None:
    """Rounding moves tokens across thresholds: most decisions are the CPU's, and the cache repeats its own pass."""
    model = on_device(case, device, torch.bfloat16)
    its = on_device(case, torch.device("cpu"), torch.bfloat16)
    ids = tokens(6, 40, seed=5)
    expected = its(ids, output_routing=True, use_cache=False).routing
    out = model(ids.to(device), output_routing=True, use_cache=False)
    assert out.logits.dtype == torch.bfloat16
    for ours, theirs in zip(out.routing, expected, strict=True):
        assert ours.scores.dtype == torch.float32
        assert (ours.selected.cpu() == theirs.selected).float().mean() >= 0.85
    parts = in_chunks(model, ids.to(device), None, (8, 9, 30))
    assert (parts.argmax(-1) == out.logits.argmax(-1)).float().mean() >= 0.6


@torch.no_grad()
def test_generate_continues_as_the_cpu_does(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, with beams, and with drafts from the prompt."""
    model, its = on_device("dtf", device), reference("dtf")
    row = tokens(1, 9, 2)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}
    expected = its.generate(row, **how)
    assert not near_tie(its, expected)
    for looks in LOOKS:
        monkeypatch.setattr(model.model, "looks", looks)
        for more in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(model.generate(row.to(device), **how, **more).cpu(), expected), (looks, more)
        assert model.generate(row.to(device), **how, num_beams=3).shape == expected.shape
