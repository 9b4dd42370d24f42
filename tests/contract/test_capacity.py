"""Capacity: `topk` routes exactly K tokens of each row; calibrated `threshold` routes the share asked for."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtfcli.models.conversion import convert
from dtfcli.models.routing import select_topk, sink_mask
from tests.budget import examples
from tests.tiny import TOKENWISE, dense_model, routed_model, tokens


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


@pytest.mark.parametrize("architecture", TOKENWISE)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_thresholds_route_the_share_asked_for_on_other_text(family: str, architecture: str) -> None:
    """Random weights and random tokens, 512 sequences; shares by layer and over all layers."""
    model = routed_model(family, architecture)
    model.calibrate([{"input_ids": tokens(64, 96, seed=s)} for s in range(4)])
    other = [tokens(128, 96, seed=100 + s) for s in range(4)]
    for capacity in (0.125, 0.25, 0.5, 0.75, 0.6, 0.04):
        with model.routing_mode("threshold", capacity):
            runs = [model(batch, output_routing=True).routing for batch in other]
        shares = torch.tensor([[record.selected.float().mean() for record in run] for run in runs]).mean(0)
        assert (shares - capacity).abs().max() <= 0.03, (capacity, shares)
        assert (shares.mean() - capacity).abs() <= 0.02, (capacity, shares)


@torch.no_grad()
def test_per_layer_capacities() -> None:
    model = routed_model(capacity=[0.25, 0.75, 1.0])
    model.calibrate([{"input_ids": tokens(64, 96, seed=s)} for s in range(4)])
    batch = tokens(256, 96, seed=50)
    shares = [record.selected.float().mean().item() for record in model(batch, output_routing=True).routing]
    assert shares == pytest.approx([0.25, 0.75, 1.0], abs=0.03)
    with model.routing_mode("topk"):
        counts = [int(record.selected[0].sum()) for record in model(batch, output_routing=True).routing]
    assert counts == [24, 72, 96]


@torch.no_grad()
def test_sinks_are_always_routed_and_counted() -> None:
    model = routed_model(sink_tokens=4, capacity=0.25)
    model.calibrate([{"input_ids": tokens(64, 32, seed=s)} for s in range(4)])
    records = model(tokens(256, 32, seed=9), output_routing=True).routing
    for record in records:
        assert record.selected[:, :4].all()
        assert record.selected.float().mean() == pytest.approx(0.25, abs=0.03)


def test_uncalibrated_threshold_routing_is_refused() -> None:
    from dtfcli.models.conversion import convert
    from tests.tiny import dense_model

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
    from dtfcli.models.conversion import convert
    from tests.tiny import dense_model

    model = convert(dense_model(), capacity=0.25).train()
    for seed in range(30):
        model(tokens(16, 64, seed=seed))
    model.eval()
    assert model.is_calibrated
    records = model(tokens(64, 64, seed=77), output_routing=True).routing
    assert [r.selected.float().mean().item() for r in records] == pytest.approx([0.25] * 3, abs=0.12)


def test_a_capacity_of_the_grid_needs_no_other() -> None:
    from dtfcli.models.conversion import convert
    from tests.tiny import dense_model

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


def test_one_budget_takes_one_share() -> None:
    with pytest.raises(ValueError, match="budget = 'model' give one share"):
        convert(dense_model(), score="update_size", budget="model", capacity=[0.25, 0.5, 0.75])
    with pytest.raises(ValueError, match="budget = 'model'"):
        convert(dense_model(), "mod", score="update_size", budget="model")


def test_one_budget_while_capacity_is_on_its_way() -> None:
    """At γ = 1 every token enters, and the tracked threshold stays that of the model's own γ."""
    from dtfcli.training.curriculum import annealed_capacity

    model: Any = routed_model(score="update_size", budget="model", explore=1.0).train()
    for seed in range(20):
        with annealed_capacity(model, 1.0, 1.0):
            records = model(tokens(8, 64, seed=seed), output_routing=True).routing
        assert all(record.selected.all() for record in records)
    shares = [r.selected.float().mean().item() for r in model(tokens(32, 64, seed=99), output_routing=True).routing]
    assert sum(shares) / 3 == pytest.approx(0.5, abs=0.1)


def test_a_level_waits_for_costs() -> None:
    """With rows of sinks alone nothing is known of what skipping costs."""
    model: Any = convert(dense_model(), score="update_size", sink_tokens=4).train()
    model(tokens(4, 3))
    assert all(router.level.isnan() for router in model.model.routers.values())
    model(tokens(4, 30))
    before = {index: router.level.clone() for index, router in model.model.routers.items()}
    assert not any(level.isnan() for level in before.values())
    model(tokens(4, 3))
    assert all(torch.equal(router.level, before[index]) for index, router in model.model.routers.items())
