"""`routed_layers = "auto"`: layers, part and capacities by what leaving each out costs, at the FLOPs asked for."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.data.prepare import prepare_data
from dtfcli.errors import ConfigError
from dtfcli.experiment import preview, train
from dtfcli.loading.build import build_model, build_tokenizer
from dtfcli.loading.load import load_model
from dtfcli.runs.folder import run_settings
from dtfcli.settings import Settings
from dtfcli.training.choosing import shares_at, skipping_costs
from tests.training.small_runs import small_settings, write_text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that has seen two batches."""
    folder = tmp_path_factory.mktemp("base")
    write_text(folder)
    return train(small_settings(folder, "dense", training={"max_steps": 2})).final_model_path


def auto_settings(folder: Path, base: Path, **model: Any) -> Settings:
    """A run of two updates that chooses its layers."""
    write_text(folder)
    small = small_settings(folder, training={"max_steps": 2})
    fields = {"architecture": "dtf", "base": str(base), "routed_layers": "auto", "flops_share": 0.8} | model
    return Settings.model_validate(small.model_dump(exclude_none=True, exclude={"model"}) | {"model": fields})


@given(
    scales=st.lists(st.floats(0.0, 3.0), min_size=2, max_size=12),
    power=st.floats(1.5, 4.0),
    wanted=st.floats(0.3, 0.95),
)
def test_the_shares_save_what_is_asked_for_where_it_is_cheapest(
    scales: list[float], power: float, wanted: float
) -> None:
    count = len(scales) + 1  # one layer may not route
    costs = {layer: [max(scale, 1e-3) * (i / 64) ** power for i in range(65)] for layer, scale in enumerate(scales)}

    def flops(shares: Any) -> float:
        return (count - sum(1 - share for share in shares.values())) / count

    found = shares_at(costs, wanted, flops)
    least = (count - 0.875 * len(scales)) / count
    if wanted < least - 1e-9:
        assert found is None
        return
    assert found is not None
    assert flops(found) <= wanted + 1e-6
    assert all(0.125 <= share <= 1.0 for share in found.values())
    by_cost = sorted(found, key=lambda layer: scales[layer])
    assert all(found[a] <= found[b] + 1e-9 for a, b in pairwise(by_cost)), "the dearer, the more enter"
    prices = []
    for layer, share in found.items():
        at = round(64 * (1 - share))
        if 0 < at < 56:  # Lagrange: a token more saves about the same everywhere
            prices.append((costs[layer][at] - costs[layer][at - 1], costs[layer][at + 1] - costs[layer][at]))
    assert not prices or max(last for last, _ in prices) <= min(following for _, following in prices) + 1e-9


@pytest.mark.parametrize("bypass", ["identity", "forecast"])
@pytest.mark.parametrize("part", ["block", "mlp", "attention"])
def test_a_layer_that_does_nothing_costs_nothing(part: str, bypass: str, base: Path, tmp_path: Path) -> None:
    """The loss of a model whose layers half of the tokens skip falls when all enter one of them, unless it is idle."""
    model = load_model(str(base))
    torch.manual_seed(0)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for matrix in (layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight):
                torch.nn.init.normal_(matrix, std=0.0 if index == 1 else 0.05)
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    model.save_pretrained(changed)
    fields = {"score": "forecast_error" if bypass == "forecast" else "update_size", "bypass": bypass}
    settings = auto_settings(tmp_path, changed, **fields)
    rows = prepare_data(settings.data, build_tokenizer(settings), seed=0).train[:40]
    shown: list[float] = []
    costs = skipping_costs(settings, part, rows, lambda what, share: shown.append(share))
    assert list(costs) == [1, 3], "every second one"
    for own in costs.values():
        assert own[0] == 0.0
        assert own == sorted(own)
    assert max(costs[1]) <= 1.001e-3
    assert costs[3][32] >= 1e-3, "less cannot be measured"
    assert shown == sorted(shown)
    assert shown[-1] == 1.0


@pytest.mark.parametrize(
    "model",
    [
        {"score": "update_size"},
        {"score": "surprise"},
        {"routed_part": "mlp", "architecture": "mod", "flops_share": 0.92},
    ],
)
def test_a_run_keeps_what_it_chose(model: dict[str, Any], base: Path, tmp_path: Path) -> None:
    settings = auto_settings(tmp_path, base, **model)
    result = train(settings)
    chosen = run_settings(result.run_dir)
    assert isinstance(chosen.model.routed_layers, list)
    assert isinstance(chosen.model.capacity, list)
    assert len(chosen.model.routed_layers) == len(chosen.model.capacity)
    assert chosen.model.routed_part == (model.get("routed_part") or chosen.model.routed_part)
    assert all(layer % 2 for layer in chosen.model.routed_layers)
    built = build_model(chosen, meta=True)
    share = forward_flops_per_token(built, 32) / forward_flops_per_token(built, 32, dense=True)
    assert share == pytest.approx(model.get("flops_share", 0.8), abs=0.03)


def test_a_dry_run_shows_a_guess(base: Path, tmp_path: Path) -> None:
    shown = preview(auto_settings(tmp_path, base, score="update_size"))
    assert shown.account.share_of_dense == pytest.approx(0.8, abs=0.03)


def test_too_few_flops_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.flops_share = 0\.05"):
        preview(auto_settings(tmp_path, base, score="update_size", flops_share=0.05))
