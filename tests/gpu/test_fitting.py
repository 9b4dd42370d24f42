"""Calibration and fitting on a GPU find what they find on the CPU."""

import copy
from typing import Any

import pytest
import torch

from dtfcli.models.conversion import convert
from tests.cases import Case, every_way
from tests.gpu.cases import assert_alike
from tests.tiny import dense_model, pad, tokens

pytestmark = pytest.mark.gpu

FITTED = (
    "surprise, every key, forecast",
    "update size, every key",
    "forecast error",
    "layerdrop, forecast",
)
TOLERANCE = 2e-2
"""Tokens at a threshold may fall on either side of it, and the layers above are fitted to what is left."""


def batches() -> list[dict[str, torch.Tensor]]:
    """Rows of several lengths, padded on either side."""
    rows = tokens(12, 48, seed=3)
    padded = [pad(row[: 48 - n], n % 3, n - n % 3) for n, row in enumerate(rows)]
    ids, masks = (torch.stack(parts) for parts in zip(*padded, strict=True))
    return [{"input_ids": ids[:6], "attention_mask": masks[:6]}, {"input_ids": tokens(8, 48, seed=4)}]


def converted(case: Case) -> Any:
    return convert(dense_model(case.family), **case.fields)


@every_way
def test_calibrated(case: Case, device: torch.device) -> None:
    model = converted(case)
    other = copy.deepcopy(model).to(device)
    for of in (model, other):
        of.calibrate(batches(), capacities=(0.125, 0.75))
        assert of.is_calibrated
    assert_alike(other.state_dict(), model.state_dict(), TOLERANCE)


@pytest.mark.parametrize("way", FITTED)
def test_fitted(way: str, device: torch.device) -> None:
    """Where the model is, and a layer at a time on the device while the model stays on the CPU."""
    models = [converted(Case(way, "llama")) for _ in range(3)]
    models[1].to(device)
    for model, where in zip(models, (None, None, device), strict=True):
        model.fit_routing(batches(), device=where)
    assert {parameter.device.type for parameter in models[2].parameters()} == {"cpu"}
    for other in models[1:]:
        assert other.is_fitted
        assert_alike(other.state_dict(), models[0].state_dict(), TOLERANCE)
