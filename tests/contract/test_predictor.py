"""`predictor` routing: trained on the top-K mask without pulling at the model, causal, cached, calibrated for any γ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtfcli.models.cache import RoutedCache
from dtfcli.models.conversion import convert
from tests.budget import examples
from tests.near import near_tie
from tests.tiny import FAMILIES, TOKENWISE, VOCABULARY, dense_model, pad, shared_routed_model, tokens

every_model = [pytest.mark.parametrize("family", FAMILIES), pytest.mark.parametrize("architecture", TOKENWISE)]


def for_every_model(function: Any) -> Any:
    for mark in every_model:
        function = mark(function)
    return function


@for_every_model
@given(data=st.data())
@settings(max_examples=examples(13))
@torch.no_grad()
def test_does_not_see_the_future(family: str, architecture: str, data: st.DataObject) -> None:
    model = shared_routed_model(family, architecture, predictor_loss_weight=0.01)
    length = data.draw(st.integers(2, 60))
    input_ids = tokens(10, length, data.draw(st.integers(0, 2**20)))
    changed = torch.tensor(data.draw(st.lists(st.integers(1, length - 1), min_size=10, max_size=10)))
    later = torch.arange(length) >= changed.unsqueeze(1)
    other = torch.where(later, (input_ids + data.draw(st.integers(1, VOCABULARY - 1))) % VOCABULARY, input_ids)
    with model.routing_mode("predictor", data.draw(st.sampled_from([None, 0.125, 0.25, 0.75, 1.0]))):
        difference = model(input_ids).logits - model(other).logits
    assert difference[~later].abs().max() <= 1e-5


@for_every_model
@given(
    rows=st.lists(st.tuples(st.integers(1, 24), st.integers(0, 2**20), st.integers(0, 8)), min_size=1, max_size=4),
    cut=st.integers(1, 20),
    capacity=st.sampled_from([None, 0.25, 0.5, 1.0]),
)
@settings(max_examples=examples(12))
@torch.no_grad()
def test_cached_padded_and_batched_agree(
    family: str, architecture: str, rows: list[tuple[int, int, int]], cut: int, capacity: float | None
) -> None:
    model = shared_routed_model(family, architecture, predictor_loss_weight=0.01)
    alone = [tokens(1, length, seed) for length, seed, _ in rows]
    width = max(length + left for length, _, left in rows)
    padded = [pad(row[0], left, width - left - row.shape[1]) for row, (_, _, left) in zip(alone, rows, strict=True)]
    input_ids, mask = (torch.stack(parts) for parts in zip(*padded, strict=True))
    cut = min(cut, width)
    with model.routing_mode("predictor", capacity):
        cache = RoutedCache(model.config)
        parts = [model(input_ids[:, :cut], attention_mask=mask[:, :cut], past_key_values=cache).logits]
        for t in range(cut, width):
            step = model(input_ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            parts.append(step.logits)
        cached = torch.cat(parts, 1)
        for b, row in enumerate(alone):
            if near_tie(model, row):
                continue
            reference = model(row, use_cache=False).logits[0]
            assert (cached[b][mask[b].bool()] - reference).abs().max() <= 1e-4


@pytest.mark.parametrize("architecture", TOKENWISE)
def test_learns_the_mask_and_leaves_the_model_alone(architecture: str) -> None:
    model = convert(dense_model(), architecture, predictor_loss_weight=0.01).train()
    input_ids = tokens(8, 32)
    plain = convert(dense_model(), architecture).train()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "predictor" not in k})
    for each in (model, plain):
        each(input_ids, labels=input_ids).loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)

    own = [p for name, p in model.named_parameters() if "predictor" in name]
    optimizer = torch.optim.Adam(own, lr=3e-3)

    def right() -> float:
        with torch.no_grad():
            records = model(input_ids, output_routing=True).routing
        return sum(float(((r.predictor_logits > 0) == r.selected).float().mean()) for r in records) / len(records)

    before = right()
    for _ in range(120):
        optimizer.zero_grad()
        out = model(input_ids, labels=input_ids)
        out.router_loss.backward()
        optimizer.step()
    assert right() > max(0.8, before)
    torch.testing.assert_close(out.loss, out.lm_loss + out.router_loss + 0.05 * (out.prior_loss or 0.0))


@pytest.mark.slow
@torch.no_grad()
def test_its_own_rule_and_calibrated_shares() -> None:
    model = shared_routed_model("llama", "mod", predictor_loss_weight=0.01)
    with model.routing_mode("predictor"):
        for record in model(tokens(4, 30), output_routing=True).routing:
            routed = record.predictor_logits > 0
            routed[:, 0] = True  # the sink
            assert torch.equal(record.selected, routed)
            assert record.scores is record.predictor_logits
    model = convert(dense_model(), predictor_loss_weight=0.01).eval()
    model.calibrate([{"input_ids": tokens(64, 96, seed=s)} for s in range(4)])
    for capacity in (0.125, 0.25, 0.75, 0.6):
        with model.routing_mode("predictor", capacity):
            runs = [model(tokens(128, 96, seed=100 + s), output_routing=True).routing for s in range(4)]
        shares = torch.tensor([[record.selected.float().mean() for record in run] for run in runs]).mean(0)
        assert (shares - capacity).abs().max() <= 0.03, (capacity, shares)


def test_a_model_without_one_says_so(tmp_path: Path) -> None:
    model = shared_routed_model("llama", "dtf")
    with pytest.raises(ValueError, match="predictor_loss_weight above 0"):
        model.set_routing("predictor")
    with pytest.raises(ValueError, match="predictor_loss_weight above 0"):
        convert(dense_model(), routing="predictor")
    with pytest.raises(ValueError, match="predictor_loss_weight"):
        convert(dense_model(), predictor_loss_weight=-1)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = convert(dense_model(), "dtf", predictor_loss_weight=0.01).eval()
    model.calibrate([{"input_ids": tokens(16, 64)}])
    model.set_routing("predictor")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.routing == "predictor"
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2, 20)).logits, model(tokens(2, 20)).logits)
    assert {"router.predictor_thresholds", "predictor.w_in.weight"} <= {
        key.split(".", 3)[3] for key in model.state_dict() if ".layers.1." in key
    }
