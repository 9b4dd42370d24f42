"""What takes longest on a GPU, and so comes last: compilers, whole runs, checkpoints that change the device."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.experiment import train
from dtfcli.loading.load import load_model
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import list_checkpoints, run_settings
from dtfcli.settings import Settings
from dtfcli.training.compiling import compile_layers
from dtfcli.training.events import TrainEvent
from tests.cases import decode
from tests.gpu.cases import assert_alike, build, losses_and_gradients
from tests.tiny import tokens
from tests.training.small_runs import small_settings

pytestmark = pytest.mark.gpu

FORECASTS = {"score": "forecast_error", "bypass": "forecast", "explore": 0.25}


def settings_on(folder: Path, device: str, dtype: str = "float32", **groups: dict[str, Any]) -> Settings:
    folder.mkdir(exist_ok=True)
    return small_settings(folder, run={"device": device, "dtype": dtype}, **groups)


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run(dtype: str, device: torch.device, tmp_path: Path) -> None:
    """float16 scales its losses: its first updates may be passed over, the later ones count."""
    if dtype == "float16" and device.type == "cpu":
        pytest.skip("a CPU does not train in it")
    model = FORECASTS if dtype == "bfloat16" else {}
    result = train(settings_on(tmp_path, device.type, dtype, model=model, training={"max_steps": 12}))
    found = losses(result.run_dir)
    assert all(math.isfinite(loss) for loss in found)
    assert found[-1] < found[0] - 0.2
    assert math.isfinite(result.metrics["val/loss"])
    assert 0.2 < result.metrics["val/routed_share"] < 0.8
    assert load_model(str(result.run_dir), device="cpu").is_calibrated
    assert load_model(str(result.run_dir), device=device.type).device.type == device.type


class Stopped(BaseException):
    """What no handler in the loop catches."""


def stop(event: TrainEvent) -> None:
    if (event.kind, event.step) == ("step", 3):
        raise Stopped


def test_a_checkpoint_goes_on_elsewhere(device: torch.device, tmp_path: Path) -> None:
    """Begun on the device and resumed on the CPU, and the other way round: the losses of a run on the CPU alone."""
    whole = train(settings_on(tmp_path / "whole", "cpu", training={"log_every": 1}))
    for name, first, then in (("there", device.type, "cpu"), ("here", "cpu", device.type)):
        folder = tmp_path / name
        with pytest.raises(Stopped):
            train(settings_on(folder, first, training={"log_every": 1}), on_event=stop)
        (run,) = (folder / "outputs").glob("*/small")
        assert [path.name for path in list_checkpoints(run)] == ["step-000002"]
        saved = run_settings(run)
        elsewhere = saved.model_copy(update={"run": saved.run.model_copy(update={"device": then})})
        result = train(elsewhere, resume=run)
        assert losses(result.run_dir) == pytest.approx(losses(whole.run_dir), abs=1e-3)
        assert result.metrics["val/loss"] == pytest.approx(whole.metrics["val/loss"], abs=5e-3)


def test_compiled_layers_train_the_same(device: torch.device) -> None:
    """With the compiler's own backend on a GPU, which has Triton to write for."""
    torch._dynamo.reset()
    model, ids = build("surprise").to(device), tokens(2, 64).to(device)
    expected = losses_and_gradients(copy.deepcopy(model), ids)
    compile_layers(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    assert_alike(losses_and_gradients(model, ids), expected, 1e-3)


def test_compiled_layers_decode_the_same(device: torch.device) -> None:
    """In fixed shapes, inside of a graph."""
    torch._dynamo.reset()
    model, ids = build("forecast error, every key").to(device), tokens(2, 16).to(device)
    expected, _ = decode(model, ids, 10)
    compile_layers(model, backend="inductor" if device.type == "cuda" else "eager")
    logits, _ = decode(model, ids, 10, None, 20)
    assert (logits - expected).abs().max() <= 1e-4
