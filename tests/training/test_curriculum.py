"""Capacity annealing: a function of the step, and what runs make of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.errors import ConfigError
from dtfcli.experiment import train
from dtfcli.runs.files import read_metrics
from dtfcli.settings import load_settings
from dtfcli.settings.training import TrainingSettings
from dtfcli.shares import measured_shares
from dtfcli.training import loop
from dtfcli.training.curriculum import annealed_capacity, annealing_left
from dtfcli.training.validation import calibration_batches
from tests.tiny import routed_model, tokens
from tests.training.small_runs import small_settings


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_way_that_is_left(schedule: str) -> None:
    training = TrainingSettings(capacity_schedule=schedule, capacity_fraction=0.4)
    left = [annealing_left(step, 50, training) for step in range(50)]
    assert left[0] == 1.0
    assert left[10] == pytest.approx(0.5)
    assert left[20:] == [0.0] * 30
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == 21
    assert annealing_left(0, 50, TrainingSettings()) == 0.0


@pytest.mark.parametrize("architecture", ["dtf", "mod"])
def test_top_k_takes_the_capacity_of_the_step(architecture: str) -> None:
    """Exactly ⌊γT⌋ of each row, layer by layer; thresholds follow; outside everything is as before."""
    own = [0.25, 0.5, 0.75]
    model: Any = routed_model(architecture=architecture, capacity=own).train()
    batch = tokens(3, 40)
    for left, start, expected in (
        (1.0, 1.0, [1.0, 1.0, 1.0]),
        (0.5, 1.0, [0.625, 0.75, 0.875]),
        (0.0, 1.0, own),
        (1.0, 0.1, [0.1] * 3),
    ):
        with annealed_capacity(model, left, start) as mean:
            records = model(input_ids=batch, labels=batch, output_routing=True).routing
        assert mean == pytest.approx(sum(expected) / 3)
        for record, capacity in zip(records, expected, strict=True):
            assert record.selected.sum(1).tolist() == [max(1, int(capacity * 40))] * 3
    assert list(model.model.capacities().values()) == own


def test_at_capacity_one_the_annealed_model_is_dense() -> None:
    from dtfcli import to_dense

    model: Any = routed_model(capacity=0.25).train()
    batch = tokens(2, 30)
    with annealed_capacity(model, 1.0, 1.0), torch.no_grad():
        loss = model(input_ids=batch, labels=batch).lm_loss
    assert loss.item() == pytest.approx(to_dense(model).eval()(input_ids=batch, labels=batch).loss.item(), abs=1e-5)


def test_it_is_put_back_after_an_error() -> None:
    model: Any = routed_model()
    with pytest.raises(RuntimeError, match="x"), annealed_capacity(model, 1.0, 1.0):
        raise RuntimeError("x")
    assert list(model.model.capacities().values()) == [0.5] * 3


def test_an_annealed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """γ falls while training; evaluations, thresholds and the saved model are at the model's own."""
    at_evaluation: list[list[float]] = []
    shares: list[float] = []

    def evaluate(run: Any, evaluate: Any = loop._validate_run) -> Any:
        at_evaluation.append(list(run.model.model.capacities().values()))
        metrics = evaluate(run)
        text = calibration_batches(run.data.train, 256, 2, run.settings.run.seed)
        run.model.eval()
        with torch.no_grad(), run.model.routing_mode("threshold"), measured_shares(run.model) as meter:
            for batch in text:
                run.model(**batch)
        shares.append(meter.read().overall)
        return metrics

    monkeypatch.setattr(loop, "_validate_run", evaluate)  # as long as its own thresholds hold
    training = {"capacity_schedule": "linear", "capacity_fraction": 0.5, "log_every": 1, "gradient_checkpointing": True}
    result = train(small_settings(tmp_path, training=training))
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    steps = [line for line in lines if "train/capacity" in line]
    assert [line["train/capacity"] for line in steps] == pytest.approx([1.0, 5 / 6, 4 / 6, 0.5, 0.5, 0.5])
    assert [line["router/1/routed_share"] for line in steps] == [
        int(capacity * 32) / 32 for capacity in [line["train/capacity"] for line in steps]
    ]
    assert at_evaluation == [[0.5, 0.5]] * 3
    assert shares == pytest.approx([0.5] * 3, abs=0.02), "on the text of the calibration"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.capacity_fraction=0.5"], "nothing reads it, since training.capacity_schedule is constant"),
        (["training.capacity_start=0.5"], "nothing reads it"),
        (["model=dense", "training.capacity_schedule=linear"], "model.architecture is dense"),
        (["training.capacity_schedule=linear", "training.capacity_fraction=0"], "greater than 0"),
        (
            ["training.capacity_schedule=linear", "training.capacity_fraction=0.8", "training.threshold_fraction=0.3"],
            r"thresholds take over \(threshold_fraction = 0.3\); at most 0.7",
        ),
    ],
)
def test_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings("quickstart", overrides)
