"""What a GPU says in bfloat16, and the texts that it writes in float32."""

from typing import Any

import pytest
import torch

from tests.cases import Case, every_way, in_chunks
from tests.near import near_tie
from tests.tiny import tokens

pytestmark = pytest.mark.gpu


@every_way
@torch.no_grad()
def test_bfloat16(case: Case, device: torch.device) -> None:
    """Rounding moves tokens across thresholds: most decisions are the CPU's, and the cache repeats its own pass."""
    model, its = (case.fresh().to(place, torch.bfloat16) for place in (device, torch.device("cpu")))
    ids = tokens(6, 40, seed=5)
    expected = its(ids, output_routing=True, use_cache=False).routing
    out = model(ids.to(device), output_routing=True, use_cache=False)
    assert out.logits.dtype == torch.bfloat16
    for ours, theirs in zip(out.routing, expected, strict=True):
        assert ours.scores.dtype == torch.float32
        assert (ours.selected.cpu() == theirs.selected).float().mean() >= 0.85
    parts, _ = in_chunks(model, ids.to(device), None, [8, 9, 30])
    assert (parts.argmax(-1) == out.logits.argmax(-1)).float().mean() >= 0.6


@torch.no_grad()
def test_generate_continues_as_the_cpu_does(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, with beams, and with drafts from the prompt."""
    case, row = Case("surprise", "llama"), tokens(1, 9, 2)
    model, its = case.on(device), case.on()
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}
    expected = its.generate(row, **how)
    assert not near_tie(its, expected)
    for syncs in (True, False, None):
        monkeypatch.setattr(model.model, "syncs", syncs)
        for more in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(model.generate(row.to(device), **how, **more).cpu(), expected), (syncs, more)
        assert model.generate(row.to(device), **how, num_beams=3).shape == expected.shape
