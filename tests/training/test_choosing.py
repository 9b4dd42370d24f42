"""`routed_layers = "auto"`: layers, part and capacities by what leaving each out costs, at the FLOPs asked for."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.errors import ConfigError
from dtfcli.experiment import preview, train
from dtfcli.inspection.sensitivity import layer_costs
from dtfcli.loading.build import build_model
from dtfcli.runs.folder import run_settings
from dtfcli.settings import Settings
from dtfcli.training.choosing import shares_at
from tests.tiny import dense_model, tokens
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
    costs=st.lists(st.floats(0.0, 3.0), min_size=2, max_size=12),
    wanted=st.floats(0.3, 0.95),
)
def test_the_shares_save_what_is_asked_for_where_it_is_cheapest(costs: list[float], wanted: float) -> None:
    count = len(costs) + 1  # one layer may not route

    def flops(shares: Any) -> float:
        return (count - sum(1 - share for share in shares.values())) / count

    found = shares_at(dict(enumerate(costs)), wanted, flops)
    least = (count - 0.875 * len(costs)) / count
    if wanted < least - 1e-9:
        assert found is None
        return
    assert found is not None
    assert flops(found) <= wanted + 1e-6
    assert all(0.125 <= share <= 1.0 for share in found.values())
    by_cost = sorted(found, key=lambda layer: costs[layer])
    shares = [found[layer] for layer in by_cost]
    assert all(a <= b + 1e-9 for a, b in pairwise(shares)), "the dearer, the more enter"
    free = [layer for layer in found if found[layer] > 0.126]
    slopes = [max(costs[layer], 1e-3) * (1 - found[layer]) for layer in free]
    assert not slopes or max(slopes) - min(slopes) <= 1e-6, "Lagrange: the last token saved costs the same everywhere"


@pytest.mark.parametrize("part", ["block", "mlp", "attention"])
def test_what_a_layer_costs_is_measured_by_leaving_it_out(part: str) -> None:
    model, rows = dense_model(), tokens(2, 24)
    costs = layer_costs(model, rows, part)
    whole = model(rows, labels=rows).loss.item()
    for layer in (0, 3):
        changed = dense_model()
        block = changed.model.layers[layer]
        with torch.no_grad():
            for half, matrix in (("mlp", block.mlp.down_proj), ("attention", block.self_attn.o_proj)):
                if part in ("block", half):
                    matrix.weight.zero_()
        assert costs[layer] == pytest.approx(changed(rows, labels=rows).loss.item() - whole, abs=1e-4)


@pytest.mark.parametrize(
    "model", [{"score": "update_size"}, {"score": "surprise"}, {"routed_part": "mlp", "architecture": "mod"}]
)
def test_a_run_keeps_what_it_chose(model: dict[str, Any], base: Path, tmp_path: Path) -> None:
    settings = auto_settings(tmp_path, base, **model)
    result = train(settings)
    chosen = run_settings(result.run_dir)
    assert isinstance(chosen.model.routed_layers, list)
    assert isinstance(chosen.model.capacity, list)
    assert len(chosen.model.routed_layers) == len(chosen.model.capacity)
    assert chosen.model.routed_part == (model.get("routed_part") or chosen.model.routed_part)
    if model.get("score") == "surprise":
        assert all(layer % 2 for layer in chosen.model.routed_layers)
    built = build_model(chosen, meta=True)
    share = forward_flops_per_token(built, 32) / forward_flops_per_token(built, 32, dense=True)
    assert share == pytest.approx(0.8, abs=0.03)


def test_a_dry_run_shows_a_guess(base: Path, tmp_path: Path) -> None:
    shown = preview(auto_settings(tmp_path, base, score="update_size"))
    assert shown.account.share_of_dense == pytest.approx(0.8, abs=0.03)


def test_too_few_flops_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.flops_share = 0\.05"):
        preview(auto_settings(tmp_path, base, score="update_size", flops_share=0.05))
