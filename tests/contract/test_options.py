"""Every promise holds for every option in combination: scores, forecasts, routed parts, budgets."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtfcli.models import routing_naive
from dtfcli.models.cache import FullLayerCache, RoutedCache
from dtfcli.models.conversion import convert, to_dense
from dtfcli.models.routing import cost_loss, select_explored
from tests.budget import examples
from tests.contract.naive_decoder import decode
from tests.contract.test_cache import in_chunks, split
from tests.contract.test_nothing_lost import read_elsewhere
from tests.near import near_tie
from tests.tiny import FAMILIES, OPTIONS, VOCABULARY, dense_model, pad, routed_model, shared_routed_model, tokens

_QUICK = ("update size", "forecast error", "forecast error, one budget", "mod, forecast, MLP")
"""What `make test` tries; the rest is left to `make test-all`."""
every_option = pytest.mark.parametrize(
    "option", [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)


def model_of(option: str, family: str = "llama") -> Any:
    return shared_routed_model(family, **{"architecture": "dtf"} | OPTIONS[option])


@every_option
@pytest.mark.parametrize("family", FAMILIES)
def test_capacity_one_is_the_dense_model_and_back(family: str, option: str) -> None:
    dense = dense_model(family)
    routed = convert(dense, capacity=1.0, **OPTIONS[option] | {"gate": "straight_through"})
    at_zero = ("forecast_prior.linear.weight", "forecast_prior.network.w_out.weight")
    assert not any(p.any() for name, p in routed.named_parameters() if name.endswith(at_zero))
    rows = [pad(tokens(1, 20, seed=s)[0], left, 10 - left) for s, left in enumerate((0, 4, 10))]
    input_ids, mask = (torch.stack(parts) for parts in zip(*rows, strict=True))
    with torch.no_grad():
        for mode in ("threshold", "topk"):
            with routed.routing_mode(mode):
                assert (routed(input_ids).logits - dense(input_ids).logits).abs().max() <= 1e-5
                ours, theirs = (model(input_ids, attention_mask=mask).logits for model in (routed, dense))
                assert (ours - theirs)[mask.bool()].abs().max() <= 1e-5
    back = to_dense(routed)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), dense.state_dict().values(), strict=True))


@every_option
@given(
    rows=st.lists(st.tuples(st.integers(1, 24), st.integers(0, 2**20), st.integers(0, 8)), min_size=1, max_size=4),
    cuts=st.one_of(st.just(list(range(40))), st.lists(st.integers(0, 40), max_size=6)),
    capacity=st.sampled_from((0.125, 0.5, 0.75, 1.0)),
)
@settings(max_examples=examples(8))
@torch.no_grad()
def test_cached_chunked_padded_and_alone_agree(
    option: str, rows: list[tuple[int, int, int]], cuts: list[int], capacity: float
) -> None:
    model = model_of(option)
    alone = [tokens(1, length, seed) for length, seed, _ in rows]
    width = max(length + left for length, _, left in rows)
    padded = [pad(row[0], left, width - left - row.shape[1]) for row, (_, _, left) in zip(alone, rows, strict=True)]
    input_ids, mask = (torch.stack(parts) for parts in zip(*padded, strict=True))
    with model.routing_mode("topk"):
        together = model(input_ids, attention_mask=mask).logits
        for b, row in enumerate(alone):
            assert near_tie(model, row) or (together[b][mask[b].bool()] - model(row).logits[0]).abs().max() <= 1e-4
    with model.routing_mode("threshold", capacity):
        together = model(input_ids, attention_mask=mask, use_cache=False).logits
        cached = in_chunks(model, input_ids, mask, split(width, cuts))
        for b, row in enumerate(alone):
            if near_tie(model, row):
                continue
            reference = model(row, use_cache=False).logits[0]
            real = mask[b].bool()
            assert (together[b][real] - reference).abs().max() <= 1e-4
            assert (cached[b][real] - reference).abs().max() <= 1e-4
            assert (in_chunks(model, row, None, split(row.shape[1], cuts))[0] - reference).abs().max() <= 1e-4


@every_option
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_loop_over_tokens_and_layers_agrees(family: str, option: str) -> None:
    model, agreed = model_of(option, family), 0
    for seed, capacity in enumerate((0.25, 0.5, 0.75)):
        row = tokens(1, 20, seed)
        with model.routing_mode("threshold", capacity):
            if not near_tie(model, row):
                assert (
                    in_chunks(model, row, None, [7] + [1] * 13)[0] - decode(model, row[0].tolist())
                ).abs().max() <= 1e-4
                agreed += 1
    assert agreed >= 2


@every_option
@given(data=st.data())
@settings(max_examples=examples(6))
@torch.no_grad()
def test_no_look_at_the_future(option: str, data: st.DataObject) -> None:
    """16 options, 6 examples, 10 rows: 960 cases, each row changed from a place of its own."""
    model, length = model_of(option), data.draw(st.integers(2, 60))
    input_ids = tokens(10, length, data.draw(st.integers(0, 2**20)))
    changed = torch.tensor(data.draw(st.lists(st.integers(1, length - 1), min_size=10, max_size=10)))
    later = torch.arange(length) >= changed.unsqueeze(1)
    other = torch.where(later, (input_ids + data.draw(st.integers(1, VOCABULARY - 1))) % VOCABULARY, input_ids)
    with model.routing_mode("threshold", data.draw(st.sampled_from([0.125, 0.25, 0.5, 0.75]))):
        difference = model(input_ids).logits - model(other).logits
    assert difference[~later].abs().max() <= 1e-5


@every_option
@torch.no_grad()
def test_rows_can_be_reordered_and_cropped(option: str) -> None:
    model, rows, more = model_of(option), tokens(3, 15, 1), tokens(3, 4, 2)
    order = torch.tensor([2, 0, 2])
    cache = RoutedCache(model.config)
    model(rows, past_key_values=cache)
    cache.reorder_cache(order)
    cache.crop(-5)
    after = model(more, past_key_values=cache).logits
    whole = torch.cat([rows[order, :10], more], 1)
    expected = model(whole, use_cache=False).logits[:, 10:]
    compared = [b for b in range(3) if not near_tie(model, whole[b : b + 1])]
    assert compared
    assert (after - expected)[compared].abs().max() <= 1e-4


@every_option
@torch.no_grad()
def test_the_cache_keeps_what_attention_is_asked_for(option: str) -> None:
    """With the MLP routed alone, attention is dense and so is its cache."""
    model = model_of(option)
    out = model(tokens(2, 40, 3), use_cache=True, output_routing=True)
    for record in out.routing:
        layer = (out.past_key_values if hasattr(out, "past_key_values") else out.cache).layers[record.layer]
        if model.config.keeps_every_key:
            assert isinstance(layer, FullLayerCache)
            assert layer.keys.shape[2] == 40
        else:
            assert layer.counts == record.selected.sum(1).tolist()


@every_option
@torch.no_grad()
def test_the_share_asked_for_on_other_text(option: str) -> None:
    """Over all layers; with a budget of their own each layer keeps to it, too."""
    fields = {"architecture": "dtf"} | OPTIONS[option]
    if fields["architecture"] == "layerdrop":  # keeps layers: two of three at γ 0.5, every token in them
        records = model_of(option)(tokens(4, 30), output_routing=True).routing
        assert [float(record.selected.float().mean()) for record in records] == [1.0, 0.0, 1.0]
        return
    model = routed_model("llama", **fields)
    capacities = (0.125, 0.25, 0.5, 0.75)
    model.calibrate([{"input_ids": tokens(64, 96, seed=s)} for s in range(4)], capacities)
    other = [tokens(128, 96, seed=100 + s) for s in range(4)]
    for capacity in capacities:
        with model.routing_mode("threshold", capacity):
            runs = [model(batch, output_routing=True).routing for batch in other]
        shares = torch.tensor([[record.selected.float().mean() for record in run] for run in runs]).mean(0)
        assert (shares.mean() - capacity).abs() <= 0.02, (capacity, shares)
        assert model.config.budget == "model" or (shares - capacity).abs().max() <= 0.03, (capacity, shares)
        with model.routing_mode("topk"):
            record = model(other[0], output_routing=True).routing[0]
        assert set(record.selected.sum(1).tolist()) == {int(0.5 * 96)}


@every_option
def test_saved_and_loaded(option: str, tmp_path: Path) -> None:
    model, input_ids = model_of(option), tokens(3, 33)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert (again(input_ids).logits - model(input_ids).logits).abs().max() <= 1e-5  # other addresses, other kernels


def test_all_files_travel(tmp_path: Path, word_tokenizer: Any) -> None:
    read_elsewhere(model_of("forecast error, one budget"), word_tokenizer, tmp_path)


@every_option
@pytest.mark.parametrize("explore", [0.0, 0.5, 1.0])
def test_every_parameter_learns(option: str, explore: float) -> None:
    model = routed_model("llama", **{"architecture": "dtf"} | OPTIONS[option] | {"explore": explore}).train()
    out = model(tokens(2, 32), labels=tokens(2, 32))
    out.loss.backward()
    assert (out.forecast_loss is not None) == model.config.has_forecast
    assert (out.router_loss is not None) == model.config.predicts_cost
    assert out.router_loss is None or out.router_loss > 0
    kept = {layer for layer, share in model.config.layer_capacities().items() if share}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer is None or layer not in model.routed_layers or layer in kept or "forecast" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("kv_tokens", ["routed", "all"])
@pytest.mark.parametrize("part", ["block", "mlp", "attention"])
@pytest.mark.parametrize("score", ["update_size", "forecast_error"])
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    explore=st.sampled_from([0.0, 0.4, 1.0]),
)
@settings(max_examples=examples(4))
def test_what_a_layer_learns_from(
    score: str, part: str, kv_tokens: str, mode: str, lengths: list[int], seed: int, explore: float
) -> None:
    """Costs, misses and outputs of a training layer, against one row at a time and token by token, with gradients."""
    fields = {"score": score, "routed_part": part, "kv_tokens": kv_tokens, "bypass": "forecast", "score_factor": 0.1}
    model = shared_routed_model("llama", "dtf", explore=1.0, **fields)
    stack, index = model.model, 3
    layer, width = stack.layers[index], max(lengths) + 1
    router = layer.router
    padded = [
        pad(tokens(1, n, seed + i)[0], (width - n) * (i % 2), (width - n) * (1 - i % 2)) for i, n in enumerate(lengths)
    ]
    input_ids, mask = (torch.stack(parts) for parts in zip(*padded, strict=True))
    model.config.explore = explore
    model.set_training_routing(mode)
    model.train()
    try:
        with torch.no_grad():
            passing = stack.enter(stack.embed_tokens(input_ids), mask)
        entering = passing.hidden_states.clone().requires_grad_()
        out = layer(entering, frame=passing.frame, capacity=0.5, **passing.layer_inputs["full_attention"])
    finally:
        model.eval()
        model.set_training_routing("topk")
        model.config.explore = 1.0
    cos, sin = passing.layer_inputs["full_attention"]["position_embeddings"]
    weight = torch.randn_like(out.hidden_states) * mask.unsqueeze(-1)
    ours = (out.hidden_states * weight).sum() + (out.miss * out.weight).sum() + (out.ranked * mask).sum()
    theirs = torch.zeros(())
    for b in range(len(lengths)):
        real = mask[b].nonzero().flatten()
        row = entering[b, real]
        if part == "mlp":
            everyone = list(range(len(real)))
            row = _attended(layer, row, everyone, cos[b, real], sin[b, real], row, everyone)
        scores = [routing_naive.cost_score(x, router.weight, router.w_in, router.w_out, router.eps) for x in row]
        torch.testing.assert_close(out.ranked[b, real], torch.stack(scores), rtol=1e-4, atol=1e-5)
        chosen = out.selected[b, real].nonzero().flatten().tolist()
        known = (out.weight[b, real] > 0).nonzero().flatten().tolist()
        skipping = [t for t in range(1, len(real)) if t not in chosen]
        explored = [t for t in known if t not in chosen]
        assert set(known) >= set(chosen) - {0}  # but the sink
        if explore == 1.0 and mode == "topk":
            assert explored == skipping
        if explored:
            torch.testing.assert_close(out.weight[b, real][explored].sum(), torch.tensor(float(len(skipping))))

        process = partial(_processed, layer, part, row, chosen, cos[b, real], sin[b, real])

        for t in known:
            (after,) = process(row[t : t + 1], [t])
            update = (after - row[t]).detach()
            guess = layer.forecast_prior(row[t].detach()[None])[0]
            cost = routing_naive.cost(update, guess.detach() if score == "forecast_error" else None)
            miss = routing_naive.forecast_miss(update, guess)
            torch.testing.assert_close(out.cost[b, real[t]], cost, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(out.miss[b, real[t]], miss, rtol=1e-3, atol=1e-4)
            theirs = theirs + miss * out.weight[b, real[t]]
        naive = routing_naive.routed_layer(
            row,
            chosen,
            [torch.ones(())] * len(real),
            process,
            "straight_through",
            lambda x: x + layer.forecast_prior(x[None])[0],
        )
        if part == "attention":
            naive = layer.feed(naive[None])[0]
        torch.testing.assert_close(out.hidden_states[b, real], naive, rtol=1e-4, atol=1e-5)
        theirs = theirs + (naive * weight[b, real]).sum() + sum(scores)
    wanted = [entering, layer.mlp.up_proj.weight, *layer.router.parameters(), *layer.forecast_prior.parameters()]
    for a, b_ in zip(
        torch.autograd.grad(ours, wanted, allow_unused=True),
        torch.autograd.grad(theirs, wanted, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b_ is None)
        if a is not None and b_ is not None:
            torch.testing.assert_close(a, b_, rtol=1e-3, atol=1e-4)


def _attended(layer: Any, row: Any, seen: list[int], cos: Any, sin: Any, x: Any, places: list[int]) -> Any:
    """The attention half on tokens x [K, D] at some places; each sees itself and the tokens `seen` before it."""
    attended = []
    for token, t in zip(x, places, strict=True):
        before = [s for s in seen if s < t]
        states, at = torch.stack([*(row[s] for s in before), token])[None], [*before, t]
        causal = torch.ones(len(at), len(at), dtype=torch.bool).tril()[None, None]
        rotary = (cos[at][None], sin[at][None])
        attended.append(layer.attend(states, attention_mask=causal, position_embeddings=rotary)[0, -1])
    return torch.stack(attended)


def _processed(
    layer: Any, part: str, row: Any, chosen: list[int], cos: Any, sin: Any, x: Any, places: list[int]
) -> Any:
    """The routed part of tokens [K, D] at some places, keys being offered by all, or by those that entered."""
    if part == "mlp":
        return layer.feed(x[None])[0]
    seen = list(range(len(row))) if layer.config.kv_tokens == "all" else chosen
    after = _attended(layer, row, seen, cos, sin, x, places)
    return after if part == "attention" else layer.feed(after[None])[0]


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_a_score_learns_what_skipping_costs(hidden: float) -> None:
    """On tokens that it has not seen, with the layers below routed; the level makes scores costs."""
    model = routed_model("llama", score="update_size", score_factor=hidden, explore=1.0).train()
    learning = [parameter for name, parameter in model.named_parameters() if "router" in name]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    for step in range(120):
        batch = tokens(16, 32, seed=step)
        model(batch, labels=batch).router_loss.backward()
        optimizer.step()
        model.zero_grad()
    records = model(tokens(32, 32, seed=999), output_routing=True).routing
    for record in records:
        counted = record.weight > 0
        score, cost = record.scores[counted], record.cost[counted]
        assert torch.corrcoef(torch.stack([score, cost]))[0, 1] > 0.2
        level = model.model.routers[record.layer].level
        assert (score + level - cost).mean().abs() < 0.5


@given(data=st.data())
@settings(max_examples=examples(30))
def test_the_loss_of_predicted_costs(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores, cost = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.7)
    known = weight > 0
    if not known.any():
        assert cost_loss(scores, cost, weight) == 0
        return
    ours = cost_loss(scores, cost, weight)
    theirs = routing_naive.cost_loss(list(scores[known]), list(cost[known]), weight[known].tolist())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)))
    torch.testing.assert_close(cost_loss(scores + 7.0, cost, weight), ours, rtol=1e-4, atol=1e-5)


@given(data=st.data(), count=st.integers(1, 12))
@settings(max_examples=examples(60))
def test_explored_tokens_skip_and_are_drawn_without_bias(data: st.DataObject, count: int) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    selected, real, sinks = (torch.rand(batch, length, generator=generator) < share for share in (0.4, 0.8, 0.1))
    noise = torch.rand(batch, length, generator=generator)
    explored, stands_for = select_explored(noise, selected, count, real, sinks)
    free = ~selected & real & ~sinks
    assert not (explored & ~free).any()
    assert explored.sum(1).tolist() == [min(count, int(n)) for n in free.sum(1)]
    for b in range(batch):
        if explored[b].any():
            assert float(stands_for[b]) * int(explored[b].sum()) == pytest.approx(int(free[b].sum()), abs=1e-4)
            assert noise[b][explored[b]].min() >= noise[b][free[b]].sort(descending=True).values[:count].min()
