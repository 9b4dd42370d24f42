"""The loop's parts: plan, calibration text, signals, groups of parameters and the learning-rate schedule."""

import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dtfcli.errors import DataError
from dtfcli.settings.training import TrainingSettings
from dtfcli.training.calibrate import calibration_batches
from dtfcli.training.interrupt import StopRequested, StopSignal
from dtfcli.training.optim import (
    GROUPS,
    build_optimizer,
    group_of,
    parameter_groups,
    schedule_factor,
    set_learning_rates,
)
from dtfcli.training.plan import plan_run
from dtfcli.training.validation import evaluation_rows
from tests.tiny import dense_model, routed_model
from tests.training.small_runs import small_settings

RATES = {"base": 1e-5, "prior": 1e-3, "router": 1e-2, "predictor": 1e-4, "forecast": 1e-2}
TRAINING = TrainingSettings.model_validate({"learning_rates": RATES, "weight_decay": 0.1})


def test_plan(tmp_path: Path) -> None:
    plan = plan_run(small_settings(tmp_path, training={"max_steps": 10, "warmup_ratio": 0.2}), 100)
    assert plan is not None
    assert (plan.rows_per_step, plan.micro_batch_size, plan.tokens_per_step) == (4, 2, 128)
    assert (plan.total_steps, plan.warmup_steps) == (10, 2)
    assert [len(part) for part in plan.micro_batches(np.arange(5))] == [2, 2, 1]


def test_plan_by_epochs(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, training={"max_steps": None, "epochs": 2.5})
    plan = plan_run(settings, 101)
    assert plan is not None
    assert plan.total_steps == int(2.5 * 101 / 4)
    assert plan_run(settings, None) is None
    with pytest.raises(DataError, match="no row of"):
        plan_run(settings, 0)


def test_evaluations_stay_affordable(tmp_path: Path) -> None:
    """Unset intervals: ten evaluations, or fewer where they would take a fifth of the time."""
    for steps, blocks, every in ((1000, 3, 100), (20, 3, 3), (20, 60, 50)):
        training = {"max_steps": steps, "eval_every": None, "checkpoint_every": None}
        plan = plan_run(small_settings(tmp_path, data={"validation_blocks": blocks}, training=training), 100)
        assert plan is not None
        assert plan.eval_every == plan.checkpoint_every == every


def test_calibration_batches_mix_lengths() -> None:
    """Every second row is whole, the others are cut; right-padded, each row once, the same for the same seed."""
    train = np.arange(1, 200 * 32 + 1, dtype=np.int32).reshape(200, 32)
    batches = calibration_batches(train, 3000, batch_size=4, seed=3)
    lengths, rows = [], []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape
        assert (mask.diff(dim=1) <= 0).all()
        assert mask[0].all()
        assert all(torch.from_numpy(train[(row[0] - 1) // 32][: len(row)]).equal(row.int()) for row in ids)
        lengths += mask.sum(1).tolist()
        rows += ids[:, 0].tolist()
    assert 3000 <= sum(lengths) < 3000 + 32
    assert len(set(rows)) == len(rows)
    assert lengths.count(32) >= len(lengths) // 2
    assert min(lengths) >= 16
    assert len(set(lengths)) > 10
    again, other = (calibration_batches(train, 3000, 4, seed)[0]["input_ids"] for seed in (3, 4))
    assert again.equal(batches[0]["input_ids"])
    assert not again.equal(other)
    assert sum(len(batch["input_ids"]) for batch in calibration_batches(train[:3], 3000, 4, 1)) == 3


def test_evaluation_rows_are_spread() -> None:
    rows = np.arange(100).repeat(4).reshape(100, 4)
    assert evaluation_rows(rows, 3)[:, 0].tolist() == [0, 49, 99]
    assert len(evaluation_rows(rows, 1000)) == 100


def test_signals() -> None:
    reports: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with StopSignal(lambda: reports.append("once")) as stop:
        assert list(stop.between([1, 2])) == [1, 2]
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, reports) == (True, ["once"])
        with pytest.raises(StopRequested):
            list(stop.between([1, 2]))
        signal.raise_signal(signal.SIGTERM)  # a scheduler sends it to every process, and their launcher once more
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("architecture", ["dtf", "mod"])
def test_every_parameter_is_in_one_group_with_its_rate(architecture: str) -> None:
    """Only matrices are decayed, and the router's scalars where the settings say so."""
    model = routed_model(architecture=architecture)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for decayed in (False, True):
        groups = parameter_groups(model, TRAINING.model_copy(update={"decay_router_scalars": decayed}))
        grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
        assert sorted(grouped) == sorted(names.values())
        assert {group["name"] for group in groups} == {"base", "router", *(["prior"] if architecture == "dtf" else [])}
        for group in groups:
            assert group["lr"] == RATES[group["name"]]
            for parameter in group["params"]:
                assert group_of(names[id(parameter)]) == group["name"]
                matrix = parameter.ndim >= 2 or (decayed and group["name"] == "router")
                assert group["weight_decay"] == (0.1 if matrix else 0.0)


def test_frozen_parameters_are_left_out() -> None:
    model = dense_model()
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(model, TRAINING)
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
    optimizer = build_optimizer(routed_model(), TRAINING)
    for factor in (0.25, 1.0, 0.5):
        rates = set_learning_rates(optimizer.param_groups, factor)
        assert rates == {name: RATES[name] * factor for name in GROUPS if name not in ("predictor", "forecast")}
    assert all(group["lr"] == group["peak_lr"] * 0.5 for group in optimizer.param_groups)
