"""Capacity beyond `test_contract`: ties, padding, sinks, shares by layer, thresholds that training tracks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtfcli.models.conversion import convert
from dtfcli.models.routing import select_topk, sink_mask
from tests.budget import examples
from tests.tiny import EVERY_ARCHITECTURE, VOCABULARY, dense_model, routed_model, shared_routed_model, tokens


@given(
    length=st.integers(1, 300),
    capacity=st.floats(0.001, 1.0),
    sinks=st.integers(0, 4),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
@settings(max_examples=examples(300))
def test_topk_routes_exactly_k(length: int, capacity: float, sinks: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, length, generator=generator).round(decimals=1)  # with ties
    real = torch.rand(3, length, generator=generator) < data.draw(st.floats(0, 1))
    for mask in (None, real):
        forced = sink_mask(mask, sinks, (3, length), scores.device)
        selected = select_topk(scores, capacity, mask, forced)
        lengths = [length] * 3 if mask is None else mask.sum(1).tolist()
        assert selected.sum(1).tolist() == [max(1, int(capacity * n)) if n else 0 for n in lengths]
        assert mask is None or not (selected & ~mask).any()
        if forced is not None:
            assert (selected & forced).sum(1).tolist() == [
                min(int(f), int(k)) for f, k in zip(forced.sum(1), selected.sum(1), strict=True)
            ]


def test_k_is_pythons_floor_where_float32_differs() -> None:
    # 0.29 * 100 is 28.999999999999996 in float64 and 29 in float32.
    scores = torch.randn(1, 100)
    assert int(0.29 * 100) == 28
    assert int(select_topk(scores, 0.29).sum()) == 28
    assert int(select_topk(scores, 0.29, torch.ones(1, 100, dtype=torch.bool)).sum()) == 28


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


@torch.no_grad()
def test_per_layer_capacities() -> None:
    model = routed_model(capacity=[0.25, 0.75, 1.0])
    model.calibrate([{"input_ids": tokens(64, 96, seed=s)} for s in range(4)], ())
    batch = tokens(256, 96, seed=50)
    shares = [record.selected.float().mean().item() for record in model(batch, output_routing=True).routing]
    assert shares == pytest.approx([0.25, 0.75, 1.0], abs=0.03)
    with model.routing_mode("topk"):
        counts = [int(record.selected[0].sum()) for record in model(batch, output_routing=True).routing]
    assert counts == [24, 72, 96]


@torch.no_grad()
def test_sinks_are_always_routed_and_counted() -> None:
    model = routed_model(sink_tokens=4, capacity=0.25)
    model.calibrate([{"input_ids": tokens(64, 32, seed=s)} for s in range(4)], ())
    records = model(tokens(256, 32, seed=9), output_routing=True).routing
    for record in records:
        assert record.selected[:, :4].all()
        assert record.selected.float().mean() == pytest.approx(0.25, abs=0.03)


def test_uncalibrated_threshold_routing_is_refused() -> None:
    model = convert(dense_model())
    assert not model.is_calibrated
    with pytest.raises(ValueError, match=r"calibrate\(batches\)"):
        model(tokens(1, 8))


@pytest.mark.parametrize("shape", [(2, 32), (1, 64), (2, 80), (2, 1, 64, 64)])
def test_calibration_refuses_a_mask_that_does_not_cover_the_tokens(shape: tuple[int, ...]) -> None:
    model = routed_model()
    before = {index: router.thresholds.clone() for index, router in model.model.routers.items()}
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.calibrate([{"input_ids": tokens(2, 64), "attention_mask": torch.ones(shape, dtype=torch.long)}])
    for index, router in model.model.routers.items():
        assert torch.equal(router.thresholds, before[index]), index


def test_training_tracks_thresholds() -> None:
    model = convert(dense_model(), capacity=0.25).train()
    for seed in range(30):
        model(tokens(16, 64, seed=seed))
    model.eval()
    assert model.is_calibrated
    records = model(tokens(64, 64, seed=77), output_routing=True).routing
    assert [r.selected.float().mean().item() for r in records] == pytest.approx([0.25] * 3, abs=0.12)


def test_a_capacity_of_the_grid_needs_no_other() -> None:
    model = convert(dense_model(), "mod")
    model.calibrate([{"input_ids": tokens(32, 64)}], capacities=(0.125,))
    model.set_routing("threshold", 0.125)
    records = model(tokens(64, 64, seed=3), output_routing=True).routing
    assert sum(r.selected.float().mean().item() for r in records) / 3 == pytest.approx(0.125, abs=0.05)
    model.set_routing("threshold", 0.2)
    with pytest.raises(ValueError, match=r"0\.2"):
        model(tokens(1, 8))


def test_layerdrop_keeps_the_share_of_layers_that_is_asked_for() -> None:
    """Evenly spread, or the first of an order; any γ afterwards, without calibration."""
    spread = convert(dense_model(), "layerdrop", 0.5)
    assert spread.config.layer_capacities() == {1: 1.0, 3: 0.0, 5: 1.0}
    assert spread.config.layer_capacities(0.01) == {1: 0.0, 3: 1.0, 5: 0.0}
    ordered = convert(dense_model(), "layerdrop", 0.34, layer_order=[5, 1, 3])
    assert ordered.config.layer_capacities() == {1: 0.0, 3: 0.0, 5: 1.0}
    assert ordered.is_calibrated
    with torch.no_grad(), ordered.routing_mode("threshold", 0.67):
        records = ordered(tokens(2, 9), output_routing=True).routing
    assert [float(record.selected.float().mean()) for record in records] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("fields", [{"layer_order": [1, 3]}, {"layer_order": "first"}, {"capacity": [0.5, 0.5, 0.5]}])
def test_what_layerdrop_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        convert(dense_model(), "layerdrop", **fields)


def test_the_offset_of_costs_waits_for_costs() -> None:
    """With rows of sinks alone nothing is known of what skipping costs."""
    model: Any = convert(dense_model(), score="update_size", sink_tokens=4).train()
    model(tokens(4, 3))
    assert all(router.cost_offset.isnan() for router in model.model.routers.values())
    model(tokens(4, 30))
    before = {index: router.cost_offset.clone() for index, router in model.model.routers.items()}
    assert not any(offset.isnan() for offset in before.values())
    model(tokens(4, 3))
    assert all(torch.equal(router.cost_offset, before[index]) for index, router in model.model.routers.items())


def test_fields_that_are_gone_are_refused() -> None:
    with pytest.raises(ValueError, match="budget = 'model': this field is gone"):
        convert(dense_model(), score="update_size", budget="model")
