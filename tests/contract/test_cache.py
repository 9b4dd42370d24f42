"""Cached = uncached = chunked = decoded token by token, and the cache holds what it should."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.models.slots import row_groups
from tests.budget import examples
from tests.contract.naive_decoder import decode
from tests.near import near_tie
from tests.tiny import EVERY_ARCHITECTURE, FAMILIES, pad, routed_model, shared_routed_model, tokens

KV_TOKENS = ("routed", "all")
CAPACITIES = (0.125, 0.25, 0.5, 0.75, 1.0)
every_model = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE),
    pytest.mark.parametrize("kv_tokens", KV_TOKENS),
]


def for_every_model(function: Any) -> Any:
    for mark in every_model:
        function = mark(function)
    return function


def split(length: int, cuts: list[int]) -> list[int]:
    places = sorted({0, length, *(cut % length for cut in cuts)})
    return [stop - start for start, stop in pairwise(places)]


def in_chunks(model: Any, input_ids: torch.Tensor, mask: torch.Tensor | None, chunks: list[int]) -> torch.Tensor:
    cache, done, logits = RoutedCache(model.config), 0, []
    for chunk in chunks:
        stop = done + chunk
        seen = None if mask is None else mask[:, :stop]
        logits.append(model(input_ids[:, done:stop], attention_mask=seen, past_key_values=cache).logits)
        done = stop
        assert cache.get_seq_length() == done
    return torch.cat(logits, 1)


@for_every_model
@given(
    rows=st.lists(st.tuples(st.integers(1, 24), st.integers(0, 2**20), st.integers(0, 8)), min_size=1, max_size=5),
    cuts=st.one_of(st.just(list(range(40))), st.lists(st.integers(0, 40), max_size=6)),
    capacity=st.sampled_from(CAPACITIES),
)
@settings(max_examples=examples(10))
@torch.no_grad()
def test_any_chunks_any_padding(
    family: str, architecture: str, kv_tokens: str, rows: list[tuple[int, int, int]], cuts: list[int], capacity: float
) -> None:
    model = shared_routed_model(family, architecture, kv_tokens=kv_tokens)
    alone = [tokens(1, length, seed) for length, seed, _ in rows]
    width = max(length + left for length, _, left in rows)
    padded = [pad(row[0], left, width - left - row.shape[1]) for row, (_, _, left) in zip(alone, rows, strict=True)]
    input_ids, mask = (torch.stack(parts) for parts in zip(*padded, strict=True))
    with model.routing_mode("threshold", capacity):
        cached = in_chunks(model, input_ids, mask, split(width, cuts))
        for b, row in enumerate(alone):
            if near_tie(model, row):
                continue
            reference = model(row, use_cache=False).logits[0]
            assert (cached[b][mask[b].bool()] - reference).abs().max() <= 1e-4
            assert (in_chunks(model, row, None, split(row.shape[1], cuts))[0] - reference).abs().max() <= 1e-4


@for_every_model
@pytest.mark.parametrize("gate", ["straight_through", "soft"])
def test_a_loop_over_tokens_and_layers_agrees(family: str, architecture: str, kv_tokens: str, gate: str) -> None:
    model = shared_routed_model(family, architecture, kv_tokens=kv_tokens, gate=gate)
    agreed = 0
    for seed, capacity in enumerate((0.25, 0.5, 0.75)):
        row = tokens(1, 20, seed)
        with model.routing_mode("threshold", capacity), torch.no_grad():
            if near_tie(model, row):
                continue
            naive = decode(model, row[0].tolist())
            assert (in_chunks(model, row, None, [7] + [1] * 13)[0] - naive).abs().max() <= 1e-4
            agreed += 1
    assert agreed >= 2


@for_every_model
@given(data=st.data())
@settings(max_examples=examples(6))
@torch.no_grad()
def test_rows_can_be_reordered_repeated_selected_and_cropped(
    family: str, architecture: str, kv_tokens: str, data: st.DataObject
) -> None:
    model = shared_routed_model(family, architecture, kv_tokens=kv_tokens)
    batch = data.draw(st.integers(1, 4))
    rows, more = tokens(batch, 15, data.draw(st.integers(0, 999))), tokens(batch, 4, data.draw(st.integers(0, 999)))
    order = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
    removed = data.draw(st.integers(1, 14))

    def continued(change: Any, prefix: torch.Tensor, ending: torch.Tensor) -> None:
        cache = RoutedCache(model.config)
        model(rows, past_key_values=cache)
        change(cache)
        after = model(ending, past_key_values=cache).logits
        whole = torch.cat([prefix, ending], 1)
        expected = model(whole, use_cache=False).logits[:, prefix.shape[1] :]
        ties = [near_tie(model, row.unsqueeze(0)) for row in whole]
        for b, tie in enumerate(ties):
            assert tie or (after[b] - expected[b]).abs().max() <= 1e-4

    continued(lambda cache: cache.reorder_cache(order), rows[order], more)
    continued(lambda cache: cache.batch_select_indices(order[:2]), rows[order[:2]], more[: len(order[:2])])
    continued(
        lambda cache: cache.batch_repeat_interleave(2), rows.repeat_interleave(2, 0), more.repeat_interleave(2, 0)
    )
    continued(lambda cache: cache.crop(-removed), rows[:, : 15 - removed], more)
    continued(lambda cache: cache.crop(0), rows, more)


@torch.no_grad()
def test_what_a_long_text_costs_to_count_stays_bounded() -> None:
    """One entry for each decoded token would make every step slower than the one before."""
    model = routed_model("llama", "mod", routed_layers=[0, 2, 4])
    cache, ids = RoutedCache(model.config), tokens(1, 200)
    for t in range(200):
        model(ids[:, t : t + 1], past_key_values=cache)
    assert cache.get_seq_length() == 200
    for layer in (0, 2, 4):
        assert cache.layers[layer].entered.shape == (1, 200)
        assert len(cache.layers[layer]._parts) <= 32


@for_every_model
@torch.no_grad()
def test_reset_starts_afresh(family: str, architecture: str, kv_tokens: str) -> None:
    model = shared_routed_model(family, architecture, kv_tokens=kv_tokens)
    cache = RoutedCache(model.config)
    model(tokens(3, 9), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    row = tokens(1, 9, 5)
    assert torch.equal(model(row, past_key_values=cache).logits, model(row, use_cache=False).logits)


@pytest.mark.parametrize("architecture", ["dtf", "mod", "random"])
def test_thresholds_follow_capacity_and_calibration(architecture: str) -> None:
    """A cache keeps nothing of the routers, which may change while a text is continued."""
    model, ids = routed_model("llama", architecture), tokens(1, 40)
    cache, other = RoutedCache(model.config), {"input_ids": tokens(8, 64, seed=3)}

    def thresholds(at: int) -> list[float]:
        with torch.no_grad():
            out = model(ids[:, at : at + 1], past_key_values=cache, output_routing=True)
        return [record.threshold.item() for record in out.routing]

    def expected(capacity: float | None = None) -> list[float]:
        return [router.threshold("threshold", capacity).item() for router in model.model.routers.values()]

    assert thresholds(0) == expected()
    with model.routing_mode("threshold", 0.25):
        assert thresholds(1) == expected(0.25) != expected()
    before = thresholds(2)
    model.calibrate([other], capacities=())
    assert thresholds(3) == expected() != before
    cache.reset()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    with torch.no_grad():
        again = model(ids, cache=cache, output_routing=True).routing
        afresh = model(ids, cache=RoutedCache(model.config), output_routing=True).routing
    for ours, theirs in zip(again, afresh, strict=True):
        assert torch.equal(ours.scores, theirs.scores)


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_bytes_are_those_of_the_routed_tokens(architecture: str, batch: int) -> None:
    model = shared_routed_model("llama", architecture)
    input_ids = tokens(batch, 40)
    dense_layer = 2 * batch * 40 * 2 * 8 * 4  # keys and values × rows × positions × heads × head size × float32
    for capacity in (0.125, 0.5):
        with model.routing_mode("threshold", capacity):
            records = model(input_ids, output_routing=True, use_cache=False).routing
            cache = RoutedCache(model.config)
            for t in range(40):
                model(input_ids[:, t : t + 1], past_key_values=cache)
        for record in records:
            layer = cache.layers[record.layer]
            remembered = batch * 40 * (1 + 4 * (architecture == "dtf"))  # who entered; D_st
            assert layer.nbytes == int(record.selected.sum()) * 2 * 2 * 8 * 4 + remembered
            assert cache.routed_shares[record.layer] == pytest.approx(float(record.selected.float().mean()))
        assert [cache.layers[i].nbytes for i in (0, 2, 4)] == [dense_layer] * 3


@for_every_model
def test_generate(family: str, architecture: str, kv_tokens: str) -> None:
    """Greedy, sampling, beams, left padding, assisted decoding and several turns: the same with and without cache."""
    model = shared_routed_model(family, architecture, kv_tokens=kv_tokens)
    rows = [pad(tokens(1, length, length)[0], 9 - length, 0) for length in (9, 4, 6)]
    input_ids, mask = (torch.stack(parts) for parts in zip(*rows, strict=True))
    for options in ({}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            kwargs = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **options}
            texts.append(model.generate(input_ids, attention_mask=mask, use_cache=use_cache, **kwargs))
        assert torch.equal(*texts), options
    row = tokens(1, 9, 2)
    plain = model.generate(row, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.generate(row, do_sample=False, max_new_tokens=20, prompt_lookup_num_tokens=3), plain)
    cache = RoutedCache(model.config)
    first = model.generate(row, do_sample=False, max_new_tokens=6, **{CACHE_NAME: cache})
    second = model.generate(first, do_sample=False, max_new_tokens=14, **{CACHE_NAME: cache})
    assert torch.equal(second, plain)


def test_generate_uses_the_cache() -> None:
    model = shared_routed_model("llama", "dtf")
    out = model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, RoutedCache)
    assert out.past_key_values.get_seq_length() == 8


def test_what_cannot_work_is_refused() -> None:
    model = shared_routed_model("llama", "dtf")
    with pytest.raises(ValueError, match="DynamicCache"):
        model(tokens(1, 5), past_key_values=DynamicCache(config=model.config))
    cache = RoutedCache(model.config)
    model(tokens(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(1, 1), attention_mask=torch.ones(1, 1), past_key_values=cache)
    with model.routing_mode("topk"):
        with pytest.raises(ValueError, match="topk"):
            model(tokens(1, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="topk"):
            model.generate(tokens(1, 5), max_new_tokens=2)


@for_every_model
@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_long_rows_go_through_the_block_in_groups(family: str, architecture: str, kv_tokens: str, left: bool) -> None:
    """Rows that route very different numbers of tokens are prefilled group by group, and decoded together."""
    model = shared_routed_model(family, architecture, kv_tokens=kv_tokens)
    alone = [tokens(1, length, 7 * length) for length in (340, 500, 90, 480, 1)]
    padded = [pad(row[0], (500 - row.shape[1]) * left, (500 - row.shape[1]) * (not left)) for row in alone]
    input_ids, mask = (torch.stack(parts) for parts in zip(*padded, strict=True))
    more = tokens(5, 6, 11)
    with model.routing_mode("threshold", 0.5):
        cache = RoutedCache(model.config)
        records = model(input_ids, attention_mask=mask, past_key_values=cache, output_routing=True)
        groups = {len(row_groups(record.selected.sum(1).tolist())) for record in records.routing}
        assert min(groups - {0}) > 1, "these rows were chosen to fall apart"
        parts = []
        for t in range(6):
            seen = torch.cat([mask, torch.ones(5, t + 1, dtype=torch.long)], 1)
            parts.append(model(more[:, t : t + 1], attention_mask=seen, past_key_values=cache).logits)
        decoded = torch.cat(parts, 1)
        for b, row in enumerate(alone):
            whole = torch.cat([row, more[b : b + 1]], 1)
            if near_tie(model, whole):
                continue
            reference = model(whole, use_cache=False).logits[0]
            assert (records.logits[b][mask[b].bool()] - reference[:-6]).abs().max() <= 1e-4
            assert (decoded[b] - reference[-6:]).abs().max() <= 1e-4
