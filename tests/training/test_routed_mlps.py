"""Runs of models with routed MLPs: routed by threshold in training as in use."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.errors import ConfigError
from dtfcli.experiment import preview, train
from dtfcli.loading.build import build_model
from dtfcli.loading.load import load_model
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM, routed_mlps
from dtfcli.runs.files import read_metrics
from dtfcli.settings import Settings, load_settings
from dtfcli.training import loop
from dtfcli.training.loop import TrainResult
from tests.training.small_runs import Killed, assert_same, kill_at, resume, small_settings, the_run

MLP: dict[str, Any] = {"routed_part": "mlp", "routed_layers": [1, 2], "capacity": 0.7}


def mlp_settings(folder: Path, base: Path | None = None, training: Any = None, **groups: Any) -> Settings:
    """A run whose two inner MLPs route, from scratch or, with gentler rates, on a base."""
    rates = {"base": 1e-4, "forecast": 1e-3} if base else {"base": 1e-2, "forecast": 3e-3}
    gentle = {"learning_rates": rates, "calibration_tokens": 1024, "log_every": 1}
    small = small_settings(folder, training=gentle | (training or {}))
    model = MLP | ({"base": str(base)} if base else {"scratch": small.model.scratch.model_dump()})
    values = small.model_dump(exclude_none=True, exclude={"model", *groups})
    return Settings.model_validate(values | {"model": model} | groups)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(mlp_settings(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that has learned a little."""
    training = {"max_steps": 12, "eval_every": 12}
    return train(small_settings(tmp_path_factory.mktemp("base"), "dense", training=training)).final_model_path


def watched_starts(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the parameters and buffers are before the first step of the runs that follow."""
    started: dict[str, torch.Tensor] = {}

    def watched(run: Any, fit: Any = loop.fit) -> None:
        started.update({name: x.detach().clone() for name, x in run.model.state_dict().items()})
        fit(run)

    monkeypatch.setattr(loop, "fit", watched)
    return started


def test_a_run_learns_and_its_model_routes_as_it_trained(undisturbed: TrainResult) -> None:
    """The loss falls; shares are logged, and near γ at the end; nothing compares with top-K; the saved model opens."""
    lines = read_metrics(undisturbed.run_dir / "metrics.jsonl")
    steps = [line for line in lines if "train/loss" in line]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 0.5
    for line in steps:
        assert {"router/1/routed_share", "router/2/routed_share"} <= line.keys()
        assert "lr/router" not in line
        assert "lr/forecast" in line
    assert undisturbed.metrics["val/routed_share"] == pytest.approx(0.7, abs=0.1)
    assert not any("val/loss_topk" in line for line in lines)
    model = load_model(str(undisturbed.final_model_path))
    assert isinstance(model, RoutedCausalLM)
    assert (model.routed_layers, model.capacity, model.is_fitted) == ([1, 2], 0.7, True)
    assert undisturbed.sample


@pytest.mark.parametrize("lora", [False, True])
def test_forecasts_are_fitted_and_then_learn(
    lora: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run begins with what it has fitted to its text; then forecasts learn by gradient, scores by least squares."""
    started = watched_starts(monkeypatch)
    distill = {} if lora else {"enabled": True}
    messages: list[str] = []
    result = train(
        mlp_settings(tmp_path, base, lora={"enabled": lora, "merge": lora}, distill=distill),
        on_event=lambda event: messages.append(event.message),
    )
    assert "Fitting forecasts and predicted costs" in messages
    assert "Fitting scores and thresholds" in messages
    for line in read_metrics(result.run_dir / "metrics.jsonl"):
        if "train/loss" in line:
            shares = [line[f"router/{layer}/routed_share"] for layer in (1, 2)]
            assert sum(shares) / 2 == pytest.approx(0.7, abs=0.15)  # of 256 decisions
    dense, folder = load_model(str(base)), result.run_dir / "merged_model" if lora else result.final_model_path
    for name, parameter in dense.named_parameters():
        ours = started.get(name, started.get(name.replace(".weight", ".base_layer.weight")))
        assert ours is not None, name
        assert torch.equal(ours, parameter), name
    assert not any("forecast" in name and "lora" in name for name in started)
    assert lora == any("lora" in name for name in started)
    trained = load_model(str(folder)).state_dict()
    for part in ("forecast.linear.weight", "forecast.narrow.up_proj.weight", "router.weight", "router.thresholds"):
        name = f"model.layers.1.mlp.{part}"
        assert started[name].isfinite().all()
        assert started[name].any()
        assert not torch.equal(trained[name], started[name]), name
    assert torch.equal(trained["model.layers.1.mlp.router.shares"], started["model.layers.1.mlp.router.shares"])


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_run_goes_on_bit_for_bit(step: int, tmp_path: Path, undisturbed: TrainResult) -> None:
    """Before its first checkpoint, when all is fitted again, and between checkpoints."""
    with pytest.raises(Killed):
        train(mlp_settings(tmp_path), on_event=kill_at("step", step))
    assert_same(resume(the_run(tmp_path)).run_dir, undisturbed.run_dir)


def test_a_model_that_was_trained_goes_on(undisturbed: TrainResult, tmp_path: Path, monkeypatch: Any) -> None:
    """A routed base keeps what it has learned; nothing is fitted before its first step."""
    started = watched_starts(monkeypatch)
    train(mlp_settings(tmp_path, undisturbed.final_model_path, training={"max_steps": 1}))
    for name, parameter in load_model(str(undisturbed.final_model_path)).state_dict().items():
        assert torch.equal(parameter, started[name]), name


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_recomputed_activations_change_nothing(checkpointing: Any, undisturbed: TrainResult, tmp_path: Path) -> None:
    result = train(mlp_settings(tmp_path, training={"gradient_checkpointing": checkpointing}))
    assert result.metrics["val/loss"] == pytest.approx(undisturbed.metrics["val/loss"], abs=1e-4)


@pytest.mark.slow
def test_layers_are_compiled_around_their_mlps(undisturbed: TrainResult, tmp_path: Path) -> None:
    result = train(mlp_settings(tmp_path, training={"compile": True}))
    assert result.metrics["val/loss"] == pytest.approx(undisturbed.metrics["val/loss"], abs=1e-3)


def test_what_is_counted_and_what_is_trained(tmp_path: Path) -> None:
    """A dry run needs no weights; scores and clusters take no gradient."""
    account = preview(mlp_settings(tmp_path)).account
    model = build_model(mlp_settings(tmp_path))
    frozen = [name.split(".mlp.")[1] for name, p in model.named_parameters() if not p.requires_grad]
    assert set(frozen) == {"router.weight", "forecast.centers"}
    assert account.parameters - account.trainable_parameters == sum(
        p.numel() for p in model.parameters() if not p.requires_grad
    )
    assert account.new_parameters == sum(
        p.numel()
        for mlp in routed_mlps(model).values()
        for part in (mlp.router, mlp.forecast)
        for p in part.parameters()
    )
    assert 0.5 < account.share_of_dense < 1.0


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.score=surprise", "routed MLPs take 'forecast_error' alone"),
        ("model.routing=topk", "routed MLPs take 'threshold' alone"),
        ("model.kv_tokens=all", "nothing reads it, since model.routed_part is mlp"),
        ("model.explore=0.1", "nothing reads it, since model.routed_part is mlp"),
        ("model.forecast_loss_weight=1", "nothing reads it, since model.routed_part is mlp"),
        ("model.dense_edges=2", "nothing reads it, since model.routed_layers is inner"),
        ("training.threshold_fraction=0.5", "nothing reads it, since model.routed_part is mlp"),
        ("training.learning_rates.router=0.1", "nothing reads it, since model.routed_part is mlp"),
        ("training.capacity_schedule=linear", "nothing reads it, since model.routed_part is mlp"),
    ],
)
def test_settings_that_do_not_go_with_routed_mlps_say_so(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]) as caught:
        load_settings("dtf-smollm2-135m", [override])
    assert reason in str(caught.value)


def test_mod_routes_blocks() -> None:
    """DTF's preset gives way; a wish of the user is refused."""
    assert load_settings("dtf-smollm2-135m", ["model=mod"]).model.routed_part is None
    with pytest.raises(ConfigError, match=r'model\.routed_part = "mlp": nothing reads it, since .* mod'):
        load_settings("dtf-smollm2-135m", ["model=mod", "model.routed_part=mlp"])


def test_a_saving_beyond_reach_says_so(tmp_path: Path) -> None:
    settings = mlp_settings(tmp_path)
    model = settings.model.model_copy(update={"capacity": None, "routed_layers": [1]})
    with pytest.raises(ConfigError, match=r"routing 1 MLPs leaves out at most .* %"):
        build_model(settings.model_copy(update={"model": model}), meta=True)
