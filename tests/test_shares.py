"""Realized shares: counted by layer and by position, padding left out, whoever runs the model."""

import json

import pytest
import torch

from dtfcli.shares import ShareMeter, measured_shares
from tests.tiny import pad, shared_routed_model, tokens


@torch.no_grad()
def test_shares_are_those_of_the_records() -> None:
    model = shared_routed_model("llama", "dtf")
    rows = [pad(tokens(1, length, length)[0], 3, 37 - length) for length in (20, 37)]
    input_ids, mask = (torch.stack(parts) for parts in zip(*rows, strict=True))
    with measured_shares(model) as meter:
        records = model(input_ids, attention_mask=mask, output_routing=True).routing
        model(tokens(1, 300))
    model(tokens(4, 50))  # after the block: not counted
    more = model(tokens(1, 300), output_routing=True).routing
    shares = meter.read()
    assert shares.tokens == 20 + 37 + 300
    for record, other in zip(records, more, strict=True):
        routed = int(record.selected.sum() + other.selected.sum())
        assert shares.by_layer[record.layer] == pytest.approx(routed / shares.tokens)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    pairs = list(zip(records, more, strict=True))
    for name, low, high in (("1-15", 1, 16), ("16-63", 16, 64), ("64-255", 64, 256), ("256+", 256, 300)):
        inside = (positions >= low) & (positions < high)
        routed = sum(int((r.selected & inside).sum() + o.selected[0, low:high].sum()) for r, o in pairs)
        assert shares.by_position[name] == pytest.approx(routed / 3 / (int(inside.sum()) + high - low))


@torch.no_grad()
def test_decoding_counts_positions_from_the_cache() -> None:
    model = shared_routed_model("llama", "mod")
    with measured_shares(model) as meter:
        cache = model(tokens(1, 16), use_cache=True).past_key_values
        for _ in range(3):
            model(tokens(1, 1), past_key_values=cache)
    assert set(meter.read().by_position) == {"1-15", "16-63"}
    assert meter.read().tokens == 19


def test_nothing_measured_is_an_error() -> None:
    with measured_shares(shared_routed_model("llama", "dtf")) as meter:
        pass
    with pytest.raises(ValueError, match="no routed forward"):
        meter.read()


@torch.no_grad()
def test_counts_of_two_meters_add_up() -> None:
    model = shared_routed_model("llama", "dtf")
    both, sum_of_two = ShareMeter(), ShareMeter()
    for seed in (1, 2):
        with measured_shares(model) as meter:
            out = model.model(tokens(3, 40, seed=seed))
        both.add(out)
        sum_of_two.add_counts(json.loads(json.dumps(meter.counts())))
    assert sum_of_two.read() == both.read()
    sum_of_two.add_counts(ShareMeter().counts())
    assert sum_of_two.read() == both.read()
