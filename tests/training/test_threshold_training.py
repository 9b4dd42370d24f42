"""The end of a run can route by threshold, as inference does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dtfcli.experiment import train
from dtfcli.models.conversion import convert
from dtfcli.runs.files import read_metrics
from dtfcli.settings import Settings
from tests.tiny import ARCHITECTURES, dense_model, tokens
from tests.training.small_runs import small_settings, write_text

WEIGHTS = "model.safetensors"


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


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="while training choose"):
        convert(dense_model()).set_training_routing("expert")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    write_text(tmp_path)
    return small_settings(tmp_path, "mod", training={"threshold_fraction": 0.5, "log_every": 1})


def test_evaluations_leave_the_weights_alone(tmp_path: Path) -> None:
    """They calibrate thresholds for themselves; training goes on with those that it tracks."""
    weights = []
    for every in (1, 6):
        folder = tmp_path / str(every)
        folder.mkdir()
        training = {"threshold_fraction": 0.5, "eval_every": every, "checkpoint_every": 6}
        weights.append(load_file(train(small_settings(folder, training=training)).final_model_path / WEIGHTS))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_the_last_part_of_a_run(settings: Settings) -> None:
    lines = read_metrics(train(settings).run_dir / "metrics.jsonl")
    shares = [line["router/1/routed_share"] for line in lines if "train/loss" in line]
    assert shares[:3] == [0.5] * 3
    assert any(share != 0.5 for share in shares[3:])
    evaluation = next(line for line in reversed(lines) if "val/loss" in line)
    assert evaluation["val/loss_gap"] == pytest.approx(evaluation["val/loss"] - evaluation["val/loss_topk"])
