"""What changes during a run: γ, and the rule that routes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dtfcli.experiment import train
from dtfcli.models.conversion import convert, to_dense
from dtfcli.runs.files import read_metrics
from dtfcli.settings.training import TrainingSettings
from dtfcli.shares import measured_shares
from dtfcli.training import loop
from dtfcli.training.calibrate import calibration_batches
from dtfcli.training.curriculum import annealed_capacity, annealing_left
from tests.tiny import ARCHITECTURES, dense_model, routed_model, tokens
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_top_k_takes_the_capacity_of_the_step(architecture: str) -> None:
    """Exactly ⌊γT⌋ of each row, layer by layer; at γ = 1 the loss is the dense model's; outside all is as before."""
    own = [0.25, 0.5, 0.75]
    model: Any = routed_model(architecture=architecture, capacity=own).train()
    batch = tokens(3, 40)
    for left, start, expected in (
        (0.5, 1.0, [0.625, 0.75, 0.875]),
        (0.0, 1.0, own),
        (1.0, 0.1, [0.1] * 3),
        (1.0, 1.0, [1.0, 1.0, 1.0]),
    ):
        with annealed_capacity(model, left, start) as mean:
            out = model(input_ids=batch, labels=batch, output_routing=True)
        assert mean == pytest.approx(sum(expected) / 3)
        for record, capacity in zip(out.routing, expected, strict=True):
            assert record.selected.sum(1).tolist() == [max(1, int(capacity * 40))] * 3
    dense = to_dense(model).eval()(input_ids=batch, labels=batch).loss
    assert out.lm_loss.item() == pytest.approx(dense.item(), abs=1e-5)
    with pytest.raises(RuntimeError, match="x"), annealed_capacity(model, 1.0, 1.0):
        raise RuntimeError("x")
    assert list(model.model.capacities().values()) == own


def test_an_annealed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """γ falls while training; evaluations, thresholds and the saved model are at the model's own."""
    at_evaluation: list[list[float]] = []
    shares: list[float] = []

    def evaluate(run: Any, validate: Any = loop.validate) -> Any:
        at_evaluation.append(list(run.model.model.capacities().values()))
        metrics = validate(run)
        text = calibration_batches(run.data.train, 256, 2, run.settings.run.seed)
        with torch.no_grad(), run.model.routing_mode("threshold"), measured_shares(run.model) as meter:
            for batch in text:
                run.model(**batch)
        shares.append(meter.read().overall)
        return metrics

    monkeypatch.setattr(loop, "validate", evaluate)
    training = {"capacity_schedule": "linear", "capacity_fraction": 0.5, "log_every": 1, "gradient_checkpointing": True}
    result = train(small_settings(tmp_path, training=training))
    steps = [line for line in read_metrics(result.run_dir / "metrics.jsonl") if "train/capacity" in line]
    capacities = [line["train/capacity"] for line in steps]
    assert capacities == pytest.approx([1.0, 5 / 6, 4 / 6, 0.5, 0.5, 0.5])
    assert [line["router/1/routed_share"] for line in steps] == [int(capacity * 32) / 32 for capacity in capacities]
    assert at_evaluation == [[0.5, 0.5]] * 3
    assert shares == pytest.approx([0.5] * 3, abs=0.02), "on the text of the calibration"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_by_threshold_is_what_eval_does(architecture: str) -> None:
    model = convert(dense_model(), architecture)
    input_ids = tokens(6, 30)
    model.calibrate([{"input_ids": input_ids}], capacities=())
    with torch.no_grad():
        expected = model(input_ids, labels=input_ids, output_routing=True)
    model.train()
    model.set_training_routing("threshold")
    out = model(input_ids, labels=input_ids, output_routing=True)
    torch.testing.assert_close(out.lm_loss, expected.lm_loss)
    for ours, theirs in zip(out.routing, expected.routing, strict=True):
        assert torch.equal(ours.selected, theirs.selected)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.layers[1].mlp.parameters())
    with pytest.raises(ValueError, match="while training choose"):
        model.set_training_routing("expert")


def test_a_batch_that_routes_nothing_still_enters_every_layer() -> None:
    model = convert(dense_model(), "mod", sink_tokens=0)
    for router in model.model.routers.values():
        router.thresholds.fill_(1e9)
    model.train()
    model.set_training_routing("threshold")
    out = model(tokens(2, 9), labels=tokens(2, 9), output_routing=True)
    assert not any(record.selected.any() for record in out.routing)
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.layers[1].mlp.parameters())


def test_a_run_that_ends_by_threshold(tmp_path: Path) -> None:
    """The last steps route by threshold. Evaluations calibrate their own, which leaves the weights alone."""
    weights, shares = [], []
    for every in (1, 6):
        training = {"threshold_fraction": 0.5, "eval_every": every, "checkpoint_every": 6, "log_every": 1}
        result = train(small_settings(tmp_path / str(every), training=training))
        weights.append(load_file(result.final_model_path / "model.safetensors"))
        lines = read_metrics(result.run_dir / "metrics.jsonl")
        shares.append([line["router/1/routed_share"] for line in lines if "train/loss" in line])
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert shares[0] == shares[1]
    assert shares[0][:3] == [0.5] * 3
    assert any(share != 0.5 for share in shares[0][3:])
