"""Parameter groups and the learning-rate schedule."""

from itertools import pairwise

import pytest
import torch

from dtfcli.training.optim import GROUPS, group_of, parameter_groups, schedule_factor, set_learning_rates
from tests.tiny import dense_model, routed_model

RATES = {"base": 1e-5, "prior": 1e-3, "router": 1e-2, "predictor": 1e-4, "forecast": 1e-2}


@pytest.mark.parametrize("architecture", ["dtf", "mod"])
def test_every_parameter_is_in_one_group_with_its_rate(architecture: str) -> None:
    model = routed_model(architecture=architecture)
    groups = parameter_groups(model.named_parameters(), RATES, weight_decay=0.1)

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        assert group["lr"] == RATES[group["name"]]
        for parameter in group["params"]:
            assert group_of(names[id(parameter)]) == group["name"]
    assert {group["name"] for group in groups} == (
        {"base", "prior", "router"} if architecture == "dtf" else {"base", "router"}
    )


def test_only_matrices_are_decayed() -> None:
    groups = parameter_groups(routed_model().named_parameters(), RATES, weight_decay=0.1)
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)


@pytest.mark.parametrize("architecture", ["dtf", "mod"])
def test_router_scalars_are_decayed_on_request(architecture: str) -> None:
    model = routed_model(architecture=architecture)
    for decayed in (False, True):
        groups = parameter_groups(model.named_parameters(), RATES, 0.1, decay_router_scalars=decayed)
        (router,) = (group for group in groups if group["name"] == "router")
        assert router["weight_decay"] == (0.1 if decayed else 0.0)


def test_frozen_parameters_are_left_out() -> None:
    model = dense_model()
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), RATES, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_schedule_warms_up_and_falls() -> None:
    factors = [schedule_factor(step, 100, 10, "cosine") for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert schedule_factor(55, 100, 10, "linear") == pytest.approx(0.5)
    assert schedule_factor(99, 100, 10, "constant") == 1.0
    assert schedule_factor(0, 1, 0, "cosine") == 1.0


def test_learning_rates_follow_the_factor() -> None:
    groups = parameter_groups(routed_model().named_parameters(), RATES, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    for factor in (0.25, 1.0, 0.5):
        assert set_learning_rates(optimizer.param_groups, factor) == {
            name: RATES[name] * factor for name in GROUPS if name not in ("predictor", "forecast")
        }
    assert all(group["lr"] == group["peak_lr"] * 0.5 for group in optimizer.param_groups)
