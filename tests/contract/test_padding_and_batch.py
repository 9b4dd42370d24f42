"""No look at the future, at neighbors or at padding (uncached, `topk` and `threshold`)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.budget import examples
from tests.near import near_tie
from tests.tiny import EVERY_ARCHITECTURE, FAMILIES, VOCABULARY, pad, shared_routed_model, tokens

rows_with_padding = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 2**20), st.integers(0, 9)), min_size=1, max_size=5
)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("family", FAMILIES)
@given(rows=rows_with_padding, sinks=st.sampled_from([0, 1, 3]))
@settings(max_examples=examples(12))
@torch.no_grad()
def test_a_row_alone_gives_the_same_logits(
    family: str, architecture: str, mode: str, rows: list[tuple[int, int, int]], sinks: int
) -> None:
    model = shared_routed_model(family, architecture, sink_tokens=sinks)
    with model.routing_mode(mode):
        alone = [tokens(1, length, seed) for length, seed, _ in rows]
        width = max(length + left for length, _, left in rows)
        padded = [pad(row[0], left, width - left - row.shape[1]) for row, (_, _, left) in zip(alone, rows, strict=True)]
        input_ids, mask = (torch.stack(parts) for parts in zip(*padded, strict=True))
        out = model(input_ids, attention_mask=mask, output_routing=True)
        for b, row in enumerate(alone):
            if near_tie(model, row):
                continue
            reference = model(row, output_routing=True)
            assert (out.logits[b][mask[b].bool()] - reference.logits[0]).abs().max() <= 1e-4
            for ours, theirs in zip(out.routing, reference.routing, strict=True):
                assert torch.equal(ours.selected[b][mask[b].bool()], theirs.selected[0])
                assert not ours.selected[b][~mask[b].bool()].any()


@pytest.mark.parametrize("kv_tokens", ["routed", "all"])
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=examples(13))
@torch.no_grad()
def test_threshold_routing_does_not_see_the_future(
    family: str, architecture: str, kv_tokens: str, data: st.DataObject
) -> None:
    """8 combinations × 13 examples × 10 rows: 1,040 cases, each row changed from a place of its own."""
    model = shared_routed_model(family, architecture, kv_tokens=kv_tokens)
    length = data.draw(st.integers(2, 60))
    input_ids = tokens(10, length, data.draw(st.integers(0, 2**20)))
    changed = torch.tensor(data.draw(st.lists(st.integers(1, length - 1), min_size=10, max_size=10)))
    later = torch.arange(length) >= changed.unsqueeze(1)
    other = torch.where(later, (input_ids + data.draw(st.integers(1, VOCABULARY - 1))) % VOCABULARY, input_ids)
    with model.routing_mode("threshold", data.draw(st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]))):
        difference = model(input_ids).logits - model(other).logits
    assert difference[~later].abs().max() <= 1e-5


@torch.no_grad()
def test_topk_does_see_the_future() -> None:
    """Why `topk` is for training alone: the K-th best score of a row depends on all of it."""
    model = shared_routed_model("llama", "mod")
    leaks = 0
    with model.routing_mode("topk"):
        for seed in range(10):
            input_ids = tokens(1, 40, seed)
            other = input_ids.clone()
            other[:, 30:] = (other[:, 30:] + 1) % VOCABULARY
            leaks += bool((model(input_ids).logits[:, :30] - model(other).logits[:, :30]).abs().max() > 1e-3)
    assert leaks > 0


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@torch.no_grad()
def test_a_real_token_that_looks_like_padding_counts(architecture: str) -> None:
    model = shared_routed_model("llama", architecture)
    input_ids = torch.full((1, 16), 3)
    with model.routing_mode("topk"):
        records = model(input_ids, output_routing=True).routing
    expected = [16, 0, 16] if architecture == "layerdrop" else [8, 8, 8]
    assert [int(record.selected.sum()) for record in records] == expected


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@torch.no_grad()
def test_a_row_of_padding_alone_routes_nothing(mode: str) -> None:
    model = shared_routed_model("llama", "dtf")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1] = 0
    with model.routing_mode(mode):
        out = model(tokens(2, 12), attention_mask=mask, output_routing=True)
    assert all(not record.selected[1].any() for record in out.routing)
    assert out.logits[0].isfinite().all()
