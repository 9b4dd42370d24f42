"""What the cache holds, and what may be done to it: bytes, beams, cropping, rows of different lengths, `generate`."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from dtfcli.models.cache import CACHE_NAME, FullLayerCache, RoutedCache
from tests.budget import examples
from tests.cases import Case, every_way, together
from tests.near import near_tie
from tests.tiny import routed_model, shared_routed_model, tokens


@every_way
@given(data=st.data())
@settings(max_examples=examples(6))
@torch.no_grad()
def test_rows_can_be_reordered_repeated_selected_and_cropped(case: Case, data: st.DataObject) -> None:
    model, batch = case.on(), data.draw(st.integers(1, 4))
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
        for b, row in enumerate(whole.split(1)):
            assert near_tie(model, row) or (after[b] - expected[b]).abs().max() <= 1e-4

    continued(lambda cache: cache.reorder_cache(order), rows[order], more)
    continued(lambda cache: cache.batch_select_indices(order[:2]), rows[order[:2]], more[: len(order[:2])])
    continued(
        lambda cache: cache.batch_repeat_interleave(2), rows.repeat_interleave(2, 0), more.repeat_interleave(2, 0)
    )
    continued(lambda cache: cache.crop(-removed), rows[:, : 15 - removed], more)
    continued(lambda cache: cache.crop(0), rows, more)


@every_way
@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_bytes_are_those_of_the_tokens_whose_keys_are_asked_for(case: Case, batch: int) -> None:
    """Of routed tokens alone; of all where attention is dense, or sees every key."""
    model, ids = case.on(), tokens(batch, 40)
    a_token = 2 * model.config.num_key_value_heads * model.model.layers[0].self_attn.head_dim * 4  # keys, values
    remembered = batch * 40 * (1 + 4 * model.config.needs_decision_layers)  # who entered; D_st
    for capacity in (0.125, 0.5):
        with model.routing_mode(case.mode, capacity):
            records = model(ids, output_routing=True, use_cache=False).routing
            cache = RoutedCache(model.config)
            for t in range(40):
                model(ids[:, t : t + 1], past_key_values=cache)
        for record in records:
            layer = cache.layers[record.layer]
            if model.config.keeps_every_key:
                assert isinstance(layer, FullLayerCache)
                assert layer.keys.shape[2] == 40
            else:
                assert layer.nbytes == int(record.selected.sum()) * a_token + remembered
                assert cache.routed_shares[record.layer] == pytest.approx(float(record.selected.float().mean()))
        dense = [cache.layers[i] for i in range(6) if i not in model.model.routed]
        assert all(layer.nbytes <= batch * 40 * a_token for layer in dense)  # a window's may be cropped


@pytest.mark.parametrize("kv_tokens", ["routed", "all"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_layer_computes_for_its_fullest_row(kv_tokens: str, batch: int) -> None:
    """No slot stays free in a row alone, and a layer that no token enters runs nothing."""
    model = routed_model("llama", "mod", kv_tokens=kv_tokens)
    computed: dict[int, int] = {}
    for index in model.model.routed:
        model.model.layers[index].mlp.register_forward_pre_hook(
            lambda _, inputs, index=index: computed.update({index: inputs[0].shape[1]})
        )
    cache, widths = RoutedCache(model.config), set()
    for part in tokens(batch, 50).split([20, *[1] * 30], 1):
        computed.clear()
        records = model(part, past_key_values=cache, output_routing=True).routing
        fullest = {record.layer: int(record.selected.sum(1).max()) for record in records}
        assert computed == {layer: width for layer, width in fullest.items() if width}
        widths |= set(fullest.values())
    assert {0, 1} < widths


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


@every_way
@torch.no_grad()
def test_reset_starts_afresh(case: Case) -> None:
    model = case.on()
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
        with model.routing_mode("threshold", capacity):
            return [threshold.item() for threshold in model.model.thresholds().values()]

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


@every_way
def test_generate(case: Case) -> None:
    """Greedy, sampling, beams, left padding, assisted decoding and several turns: the same with and without cache."""
    model, row = case.on(), tokens(1, 9, 2)
    batch = together([tokens(1, length, length) for length in (9, 4, 6)], [0, 5, 3], [])
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    for options in ({}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            how = {"attention_mask": batch.mask, "use_cache": use_cache, **greedy, **options}
            texts.append(model.generate(batch.input_ids, **how))
        assert torch.equal(*texts), options
    plain = model.generate(row, **greedy, return_dict_in_generate=True)
    assert isinstance(plain[CACHE_NAME], RoutedCache)
    assert plain[CACHE_NAME].get_seq_length() == 20
    assert torch.equal(model.generate(row, **greedy, prompt_lookup_num_tokens=3), plain.sequences)
    cache = RoutedCache(model.config)
    first = model.generate(row, **greedy | {"max_new_tokens": 5}, **{CACHE_NAME: cache})
    mask = torch.ones_like(first)  # or else tokens that are the padding's count as padding
    second = model.generate(first, attention_mask=mask, **greedy | {"max_new_tokens": 7}, **{CACHE_NAME: cache})
    assert torch.equal(second, plain.sequences)


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


@pytest.mark.parametrize("kv_tokens", ["routed", "all"])
@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_rows_that_route_different_numbers_of_tokens(kv_tokens: str, left: bool) -> None:
    """Long and short rows are prefilled and decoded together, each as if it were alone."""
    model = shared_routed_model("qwen2", "mod" if left else "dtf", kv_tokens=kv_tokens)
    alone = [tokens(1, length, 7 * length) for length in (340, 500, 90, 480, 1)]
    batch, more = together(alone, [(500 - row.shape[1]) * left for row in alone], []), tokens(5, 6, 11)
    cache = RoutedCache(model.config)
    prompt = model(batch.input_ids, attention_mask=batch.mask, past_key_values=cache, output_routing=True)
    counts = [record.selected.sum(1).tolist() for record in prompt.routing]
    assert all(max(rows) > 2 * min(rows) for rows in counts if max(rows)), "these rows were chosen to fall apart"
    parts = []
    for t in range(6):
        seen = torch.cat([batch.mask, torch.ones(5, t + 1, dtype=torch.long)], 1)
        parts.append(model(more[:, t : t + 1], attention_mask=seen, past_key_values=cache).logits)
    decoded = torch.cat(parts, 1)
    for b, row in enumerate(alone):
        whole = torch.cat([row, more[b : b + 1]], 1)
        if near_tie(model, whole):
            continue
        reference = model(whole, use_cache=False).logits[0]
        assert (prompt.logits[b][batch.real(b)] - reference[:-6]).abs().max() <= 1e-4
        assert (decoded[b] - reference[-6:]).abs().max() <= 1e-4
