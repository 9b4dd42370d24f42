"""The loop's parts: plan, calibration text, checkpoints, signals."""

import errno
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dtfcli import experiment
from dtfcli.errors import DataError, DTFError
from dtfcli.runs.folder import list_checkpoints
from dtfcli.training.checkpoint import read_state
from dtfcli.training.interrupt import StopRequested, StopSignal
from dtfcli.training.plan import plan_run
from dtfcli.training.validation import calibration_batches, calibration_rows, evaluation_rows
from tests.training.small_runs import small_settings


def test_plan(tmp_path: Path) -> None:
    plan = plan_run(small_settings(tmp_path, training={"max_steps": 10, "warmup_ratio": 0.2}), 100)
    assert plan is not None
    assert (plan.rows_per_step, plan.micro_batch_size, plan.tokens_per_step) == (4, 2, 128)
    assert (plan.total_steps, plan.warmup_steps) == (10, 2)
    assert [len(part) for part in plan.micro_batches(np.arange(5))] == [2, 2, 1]


def test_plan_by_epochs(tmp_path: Path) -> None:
    values = small_settings(tmp_path).model_dump(exclude_none=True)
    del values["training"]["max_steps"]
    values["training"]["epochs"] = 2.5
    settings = type(small_settings(tmp_path)).model_validate(values)
    plan = plan_run(settings, 101)
    assert plan is not None
    assert plan.total_steps == int(2.5 * 101 / 4)
    assert plan_run(settings, None) is None
    with pytest.raises(DataError, match="no row of"):
        plan_run(settings, 0)


def test_evaluations_stay_affordable(tmp_path: Path) -> None:
    """Unset intervals: ten evaluations, or fewer where they would take a fifth of the time."""
    values = small_settings(tmp_path, data={"validation_blocks": 3}).model_dump(exclude_none=True)
    del values["training"]["eval_every"], values["training"]["checkpoint_every"]
    for steps, blocks, every in ((1000, 3, 100), (20, 3, 3), (20, 60, 50)):
        values["training"]["max_steps"], values["data"]["validation_blocks"] = steps, blocks
        plan = plan_run(type(small_settings(tmp_path)).model_validate(values), 100)
        assert plan is not None
        assert plan.eval_every == plan.checkpoint_every == every


def test_calibration_text_mixes_lengths() -> None:
    rows = calibration_rows(1000, 64, 6400, seed=1)
    lengths = [length for _, length in rows]
    assert 6400 <= sum(lengths) < 6400 + 64
    assert len({row for row, _ in rows}) == len(rows)
    assert set(lengths[::2]) == {64}
    assert min(lengths) >= 16
    assert len(set(lengths)) > 10
    assert calibration_rows(1000, 64, 6400, seed=1) == rows != calibration_rows(1000, 64, 6400, seed=2)
    assert len(calibration_rows(3, 64, 6400, seed=1)) == 3


def test_calibration_batches_are_right_padded() -> None:
    train = np.arange(1, 100 * 32 + 1, dtype=np.int32).reshape(100, 32)
    batches = calibration_batches(train, 1000, batch_size=4, seed=3)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) >= 1000
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape
        assert (mask.diff(dim=1) <= 0).all()
        assert mask[0].all()
        assert all(torch.from_numpy(train[(row[0] - 1) // 32][: len(row)]).equal(row.int()) for row in ids)


def test_evaluation_rows_are_spread() -> None:
    rows = np.arange(100).repeat(4).reshape(100, 4)
    assert evaluation_rows(rows, 3)[:, 0].tolist() == [0, 49, 99]
    assert len(evaluation_rows(rows, 1000)) == 100


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state = Accelerator.save_state

    def fill_up(self: Any, folder: str, **options: Any) -> Any:
        if "step-000004" in folder:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_state(self, folder, **options)

    monkeypatch.setattr(Accelerator, "save_state", fill_up)
    with pytest.raises(DTFError, match="the disk is full"):
        experiment.train(small_settings(tmp_path))
    (run,) = (tmp_path / "outputs").glob("*/small")
    (checkpoint,) = list_checkpoints(run)
    assert read_state(checkpoint).step == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]


def test_a_checkpoint_holds_no_surprises(tmp_path: Path) -> None:
    """Weights as safetensors; everything else loads with weights_only; keep_checkpoints is respected."""
    result = experiment.train(small_settings(tmp_path, training={"keep_checkpoints": 1}))
    (checkpoint,) = list_checkpoints(result.run_dir)
    assert {path.name for path in checkpoint.iterdir()} == {
        "model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json",
    }  # fmt: skip
    torch.load(checkpoint / "optimizer.bin", weights_only=True)
    assert json.loads((checkpoint / "state.json").read_text())["state"]["step"] == 6


def test_signals() -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with StopSignal(lambda: told.append("once")) as stop:
        assert list(stop.between([1, 2])) == [1, 2]
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, told) == (True, ["once"])
        with pytest.raises(StopRequested):
            list(stop.between([1, 2]))
        signal.raise_signal(signal.SIGTERM)  # of a scheduler that tells every process, and of their launcher
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
