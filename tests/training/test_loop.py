"""Whole runs, small ones."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

import dtfcli
from dtfcli.data.prepare import prepare_data
from dtfcli.errors import ConfigError
from dtfcli.experiment import train
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import run_settings
from dtfcli.training import loop
from dtfcli.training.events import TrainEvent
from dtfcli.training.interrupt import StopSignal
from dtfcli.training.loop import TrainResult
from dtfcli.training.step import TrainingDiverged
from dtfcli.training.validation import evaluation_rows
from tests.training.small_runs import small_settings

ARCHITECTURES = ("dtf", "mod", "dense")


Finished = dict[str, tuple[TrainResult, list[TrainEvent]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One finished run of each architecture, from the same folder of text."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for architecture in ARCHITECTURES:
        events: list[TrainEvent] = []
        settings = small_settings(folder, architecture, run={"name": architecture})
        runs[architecture] = train(settings, on_event=events.append), events
    return runs


def lines_of(result: TrainResult) -> list[dict[str, Any]]:
    return read_metrics(result.run_dir / "metrics.jsonl")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_run_folder(finished: Finished, architecture: str) -> None:
    result, _ = finished[architecture]
    assert {path.name for path in result.run_dir.iterdir()} == {
        "settings.toml", "metrics.jsonl", "curves.png", "checkpoints", "best_model", "final_model",
    }  # fmt: skip
    assert {path.name for path in (result.run_dir / "checkpoints").iterdir()} == {"step-000004", "step-000006"}
    assert result.final_model_path == result.run_dir / "final_model"
    files = {path.name for path in result.final_model_path.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= files
    assert ("modeling_dynamic.py" in files) == (architecture != "dense")
    assert (result.run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metrics_keys(finished: Finished, architecture: str) -> None:
    result, _ = finished[architecture]
    lines = lines_of(result)
    updates = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in updates] == [1, 2, 4, 6]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert all(line["tokens"] == line["step"] * 128 for line in lines)

    expected = {"step", "tokens", "train/loss", "train/grad_norm", "lr/base", "tokens_per_second", "mfu"}
    measured = {"step", "tokens", "val/loss", "val/bits_per_byte"}
    if architecture != "dense":
        names = {"score_mean", "score_std", "threshold", "routed_share", "gate"}
        expected |= {"lr/router"}
        measured |= {"val/loss_topk", "val/loss_gap", "router/1/routed_share", "router/3/routed_share"}
        measured |= {"val/routed_share", "val/routed_share/1-15", "val/routed_share/16-63"}
        if architecture == "dtf":
            expected |= {"train/prior_loss", "lr/prior"}
            names |= {"beta_ce", "beta_cu", "o_ce", "m_cu", "s_ce", "s_cu", "d_st", "d_ch"}
        expected |= {f"router/{layer}/{name}" for layer in (1, 3) for name in names}
    assert all(set(line) == expected for line in updates)
    assert set(evaluations[0]) == measured | {"val/unigram"}
    assert all(set(line) == measured for line in evaluations[1:])


def test_all_architectures_start_from_the_same_function_and_learn(finished: Finished) -> None:
    """Step 0 in training mode: routed layers skip tokens, but backbone and data are the same."""
    first = [lines_of(result)[1] for result, _ in finished.values()]
    losses = [line["train/loss"] for line in first if line["step"] == 1]
    assert len(losses) == 3
    assert max(losses) - min(losses) < 0.01
    for result, _ in finished.values():
        assert result.metrics["val/loss"] < lines_of(result)[0]["val/loss"] - 0.1
        assert result.best_val_loss is not None
        assert result.best_val_loss <= result.metrics["val/loss"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_final_model_reloads(finished: Finished, architecture: str) -> None:
    result, _ = finished[architecture]
    for path in (result.run_dir, result.final_model_path, result.best_model_path):
        model = dtfcli.load_model(path, device="cpu")
        assert model.dtype == torch.float32
        if architecture != "dense":
            assert model.routing == "threshold"
            assert model.is_calibrated
            model.set_routing("threshold", capacity=0.3)
        tokenizer = dtfcli.load_tokenizer(path)
        batch = tokenizer("the cat sleeps under the moon", return_tensors="pt")
        assert torch.isfinite(model(**batch, use_cache=False).logits).all()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(result.final_model_path).get_vocab() == tokenizer.get_vocab()


def test_final_model_has_the_reported_loss(finished: Finished) -> None:
    for architecture, (result, _) in finished.items():
        settings = run_settings(result.run_dir)
        model = dtfcli.load_model(result.final_model_path, device="cpu")
        rows = validation_rows(settings, result)
        losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in rows]
        assert sum(losses) / len(losses) == pytest.approx(result.metrics["val/loss"], abs=1e-4), architecture


def validation_rows(settings: Any, result: TrainResult) -> torch.Tensor:
    data = prepare_data(settings.data, dtfcli.load_tokenizer(result.run_dir), seed=settings.run.seed)
    rows = evaluation_rows(data.validation, settings.data.validation_blocks)
    return torch.from_numpy(rows.astype("int64"))


def test_events_tell_the_story(finished: Finished) -> None:
    _, events = finished["dtf"]
    kinds = [event.kind for event in events if event.kind != "phase"]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert [event.step for event in events if event.kind == "step"] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events if event.kind == "evaluation"] == [0, 3, 6]
    assert [event.step for event in events if event.kind == "checkpoint"] == [2, 4, 6]
    assert all(event.total_steps == 6 for event in events if event.kind == "step")


def test_train_loss_is_the_mean_over_the_whole_step(finished: Finished, tmp_path: Path) -> None:
    """Micro-batches of 4 rows give the logged losses of those of 2, and the same weights to 1e-4."""
    reference, _ = finished["dtf"]
    result = train(small_settings(tmp_path, training={"micro_batch_size": 4}))
    logged = [[line for line in lines_of(r) if "train/loss" in line] for r in (result, reference)]
    for line, expected in zip(*logged, strict=True):
        assert line["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-5)
        assert line["train/prior_loss"] == pytest.approx(expected["train/prior_loss"], rel=1e-4)
    weights, others = (load_file(r.final_model_path / "model.safetensors") for r in (result, reference))
    for name, tensor in weights.items():
        if "thresholds" not in name:  # averages over micro-batches, which differ
            assert torch.allclose(tensor, others[name], atol=1e-4), name


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, "dense", training={"max_steps": 1})
    first = train(settings)
    before = (first.run_dir / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"run\.name = 'small'.*run\.name=small-2.*--resume"):
        train(settings)
    assert train(settings, rename=True).run_dir.name == "small-2"
    assert (first.run_dir / "metrics.jsonl").read_text() == before
    with pytest.raises(ConfigError, match="has finished"):
        train(settings, resume=first.run_dir)


def test_nan_stops_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = loop.train_step

    def poisoned(run: Any) -> dict[str, Any]:
        if run.state.step == 4:
            with torch.no_grad():
                run.model.model.norm.weight.fill_(math.nan)
        return update(run)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(TrainingDiverged, match=r"train/loss became nan at step 5.*step-000004") as caught:
        train(small_settings(tmp_path))
    assert caught.value.exit_code == 1
    (run,) = (tmp_path / "outputs").glob("*/small")
    assert not (run / "final_model").exists()
    weights = load_file(run / "checkpoints" / "step-000004" / "model.safetensors")
    assert all(torch.isfinite(t).all() for name, t in weights.items() if "thresholds" not in name)


def test_without_validation_text(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, "mod", data={"validation_fraction": 0}, training={"max_steps": 2})
    result = train(settings)
    assert result.metrics == {}
    assert result.best_model_path is None
    assert dtfcli.load_model(result.run_dir, device="cpu").is_calibrated


def test_best_model_from_the_middle_takes_any_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter((1.0, 2.0, 3.0))
    validate = loop.validate
    monkeypatch.setattr(loop, "validate", lambda run: validate(run) | {"val/loss": next(losses)})
    result = train(small_settings(tmp_path))
    assert result.best_step == 3
    assert result.best_model_path is not None
    best, final = (load_file(path / "model.safetensors") for path in (result.best_model_path, result.final_model_path))
    assert not torch.equal(best["model.layers.0.mlp.up_proj.weight"], final["model.layers.0.mlp.up_proj.weight"])
    dtfcli.load_model(result.best_model_path, capacity=0.25, device="cpu")(torch.arange(20)[None])


@pytest.mark.parametrize("option", ["selective", "bfloat16"])
def test_memory_and_precision_options(finished: Finished, tmp_path: Path, option: str) -> None:
    precision = {"dtype": "bfloat16"} if option == "bfloat16" else {}
    checkpointing = {} if option == "bfloat16" else {"gradient_checkpointing": option}
    result = train(small_settings(tmp_path, run=precision, training=checkpointing))
    plain = finished["dtf"][0].metrics["val/loss"]
    assert result.metrics["val/loss"] == pytest.approx(plain, abs=0.05 if precision else 1e-5)
    weights = load_file(result.final_model_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


class CountConversions(TorchDispatchMode):
    """Counts how often a tensor of some shape becomes bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.count += tuple(args[0].shape) == self.shape
        return func(*args, **(kwargs or {}))


def test_weights_are_converted_once_for_all_micro_batches(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, "mod", run={"dtype": "bfloat16"}, training={"micro_batch_size": 1})
    run = loop.setup(settings, None, False, lambda event: None, StopSignal(lambda: None))
    layers = run.model.model.layers
    with CountConversions(tuple(layers[0].mlp.down_proj.weight.shape)) as conversions:
        loop.train_step(run)
    run.rows.close()
    assert conversions.count == len(layers)
