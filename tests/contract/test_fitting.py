"""Forecasts and predicted costs by least squares: what a plain solver finds, and what it does for a model."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from dtfcli.models.conversion import convert
from dtfcli.models.least_squares import Normal
from dtfcli.models.pretrained import is_added
from dtfcli.shares import measured_shares
from tests.tiny import dense_model, pad, tokens

FITTED = {
    "update size": {"score": "update_size"},
    "update size, every key": {"score": "update_size", "kv_tokens": "all"},
    "forecast error": {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"},
    "forecast error, routed keys": {"score": "forecast_error", "bypass": "forecast"},
    "surprise, forecast": {"bypass": "forecast"},
    "mod, forecast": {"architecture": "mod", "bypass": "forecast", "gate": "soft"},
    "layerdrop, forecast": {"architecture": "layerdrop", "bypass": "forecast"},
}
TEXT = tokens(24, 48, seed=3)


def converted(**fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return convert(dense_model(seed=1), fields.pop("architecture", "dtf"), fields.pop("capacity", 0.5), **fields)


def learned(model: PreTrainedModel, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of the forecasts and of the predicted costs, means over layers, on all tokens of some rows."""
    torch.manual_seed(0)
    thresholds = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model.model.training_capacities = model.config.layer_capacities(1.0)
    with torch.no_grad():
        records = model(input_ids=rows, labels=rows, output_routing=True).routing
    model.model.training_capacities = None
    model.eval().load_state_dict(thresholds, strict=False)
    counted = ~model_sinks(rows)
    missed = [record.miss[counted].mean() for record in records if record.miss is not None]
    errors = [(r.cost - r.scores)[counted].var() for r in records if r.cost is not None]
    return torch.stack(missed or [torch.zeros(())]).mean(), torch.stack(errors or [torch.zeros(())]).mean()


def model_sinks(rows: Tensor) -> Tensor:
    return (torch.arange(rows.shape[1]) == 0).expand(rows.shape)


@given(count=st.integers(1, 60), inputs=st.integers(1, 9), outputs=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_least_squares_is_the_smallest(count: int, inputs: int, outputs: int, seed: int) -> None:
    """No step away from the solution makes the weighted error with its ridge smaller; weights of 0 are not seen."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, inputs, generator=generator), torch.randn(count, outputs, generator=generator)
    weight = torch.rand(count, generator=generator) + 0.1
    ridge = 1e-2 * ((x.square() * (weight / weight.sum()).unsqueeze(1)).sum() / inputs)

    def error(matrix: Tensor) -> Tensor:
        missed = ((y - x @ matrix.t()).square().sum(1) * weight).sum() / weight.sum()
        return missed + ridge * matrix.square().sum()

    found = Normal(x, weight).solve(y).t().double()
    x, y, weight = x.double(), y.double(), weight.double()
    for _ in range(10):
        step = 0.05 * torch.randn(found.shape, generator=generator).double()
        assert error(found) <= error(found + step) * (1 + 1e-6)  # found in float32
    normal = Normal(torch.cat([x, 100 + x]).float(), torch.cat([weight, 0 * weight]).float())
    more = normal.solve(torch.cat([y, y]).float()).t()
    torch.testing.assert_close(more, found.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FITTED)
def test_fitting_helps(name: str) -> None:
    """On other text of the same kind: forecasts miss less than nothing at all, scores know more than a constant."""
    fields = FITTED[name]
    model, rows = converted(**fields), tokens(8, 48, seed=4)
    backbone = {name: p.clone() for name, p in model.named_parameters() if not is_added(name)}
    missed, error = learned(model, rows)
    assert not model.is_fitted
    model.fit_routing([{"input_ids": part} for part in TEXT.split(8)])
    assert model.is_fitted
    now_missed, now_error = learned(model, rows)
    if fields.get("bypass") == "forecast":
        assert missed == pytest.approx(1.0)
        assert now_missed < 0.92
    if fields.get("score", "surprise") != "surprise":
        assert now_error < 0.8 * error
    for name, parameter in backbone.items():
        assert torch.equal(parameter, model.get_parameter(name)), name
    with torch.no_grad(), measured_shares(model) as meter:
        model(input_ids=TEXT)
    if fields.get("architecture") != "layerdrop":
        assert meter.read().overall == pytest.approx(0.5, abs=0.02)


def test_the_first_layer_is_what_a_plain_solver_finds() -> None:
    """Updates of the dense model, weighted by what counts; then those that skip by the fitted score."""
    dense = dense_model(seed=1)
    model = converted(score="forecast_error", bypass="forecast", routed_layers=[2], kv_tokens="all")
    with torch.no_grad():
        states = dense(input_ids=TEXT, output_hidden_states=True).hidden_states
    x, after = states[2][:, 1:].flatten(0, 1).double(), states[3][:, 1:].flatten(0, 1).double()
    n, update = x / (x.square().mean(1, keepdim=True) + dense.config.rms_norm_eps).sqrt(), after - x

    def solve(targets: Tensor, weight: Tensor) -> Tensor:
        weight = weight / weight.sum()
        moments = n.t() @ torch.diag(weight) @ n
        ridge = 1e-2 * moments.diagonal().mean() * torch.eye(len(moments))
        return torch.linalg.inv(moments + ridge) @ n.t() @ torch.diag(weight) @ targets

    weight = 1 / update.square().mean(1)
    for _ in range(2):
        forecast = solve(update, weight)
        cost = (update - n @ forecast).square().mean(1).log()
        score = n @ solve((cost - cost.mean()).unsqueeze(1), torch.ones(len(n)).double()).squeeze(1)
        skips = score <= score.sort().values[len(score) - (TEXT.numel() // 2 - len(TEXT)) - 1]
        weight = torch.where(skips, 1.0, 0.05) / update.square().mean(1)
    model.fit_routing([{"input_ids": part} for part in TEXT.split(5)])
    torch.testing.assert_close(model.model.layers[2].forecast.linear.weight, forecast.t().float(), rtol=0, atol=5e-3)
    router = model.model.layers[2].router
    with torch.no_grad():
        found = router(states[2][:, 1:], (), None, None).score.flatten()
    torch.testing.assert_close(found, score.float(), rtol=0, atol=2e-2)
    assert router.cost_offset.item() == pytest.approx((cost - score).mean().item(), abs=1e-3)


@pytest.mark.parametrize("name", ["forecast error, routed keys", "forecast error", "mod, forecast"])
def test_padding_does_not_count(name: str) -> None:
    """Rows of several lengths, padded on either side, give what the same rows give one by one."""
    fields = FITTED[name]
    rows = [TEXT[0, :40], TEXT[1, :48], TEXT[2, :17], *TEXT[3:20]]
    alone, together = converted(**fields), converted(**fields)
    alone.fit_routing([{"input_ids": row.unsqueeze(0)} for row in rows])
    padded = [pad(row, left, 70 - len(row) - left) for row, left in zip(rows, [3, 0, 20] * 7, strict=False)]
    ids, masks = (torch.stack(parts) for parts in zip(*padded, strict=True))
    together.fit_routing([{"input_ids": ids, "attention_mask": masks}])
    for (name, one), (_, other) in zip(alone.named_parameters(), together.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=name)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to fit: convert with bypass = 'forecast'"):
        converted().fit_routing([{"input_ids": TEXT}])
    model = converted(bypass="forecast")
    with pytest.raises(ValueError, match="batches is empty"):
        model.fit_routing([])
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.fit_routing([{"input_ids": TEXT, "attention_mask": torch.ones(1, 3)}])
