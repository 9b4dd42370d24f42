"""What a run fits before its first update, and when it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.errors import ConfigError
from dtfcli.experiment import train
from dtfcli.loading.load import load_model
from dtfcli.models.pretrained import is_added
from dtfcli.runs.files import read_metrics
from dtfcli.settings import Settings, load_settings
from dtfcli.training import loop
from tests.training.small_runs import small_settings, write_text

FIELDS = {"architecture": "dtf", "score": "forecast_error", "bypass": "forecast"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that has learned a little."""
    folder = tmp_path_factory.mktemp("base")
    write_text(folder)
    return train(small_settings(folder, "dense", training={"max_steps": 20})).final_model_path


def on_base(folder: Path, base: Path, lora: bool = False, **training: Any) -> Settings:
    folder.mkdir(exist_ok=True)
    write_text(folder)
    small = small_settings(folder, training={"max_steps": 2, "log_every": 1, "weight_decay": 0.0} | training)
    values = small.model_dump(exclude_none=True, exclude={"model"})
    return Settings.model_validate(values | {"model": FIELDS | {"base": str(base)}, "lora": {"enabled": lora}})


def first_miss(result: Any) -> float:
    return next(line for line in read_metrics(result.run_dir / "metrics.jsonl") if "train/loss" in line)[
        "train/forecast_loss"
    ]


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_begins_with_what_it_has_fitted(
    lora: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the backbone moves; the first update finds forecasts, the run's view says what goes on."""
    started: dict[str, torch.Tensor] = {}
    seen: list[str] = []

    def watched(run: Any, fit: Any = loop.fit) -> None:
        started.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
        fit(run)

    monkeypatch.setattr(loop, "fit", watched)
    result = train(on_base(tmp_path, base, lora), on_event=lambda event: seen.append(event.message))
    assert first_miss(result) < 0.8
    assert "Fitting forecasts and predicted costs" in seen
    dense = load_model(str(base))
    for name, parameter in dense.named_parameters():
        found = started.get(name, started.get(name.replace(".weight", ".base_layer.weight")))
        assert found is not None, name
        assert torch.equal(found, parameter), name
    assert any(is_added(name) and "forecast" in name and p.any() for name, p in started.items())


def test_what_was_fitted_or_trained_is_kept(base: Path, tmp_path: Path) -> None:
    """A routed base is fitted again if asked alone; a run without a fit starts from nothing."""
    trained = train(on_base(tmp_path / "first", base)).final_model_path
    untouched, again = (train(on_base(tmp_path / name, trained, **more)) for name, more in RUNS.items())
    assert first_miss(untouched) != first_miss(again)
    none = train(on_base(tmp_path / "none", base, fit_tokens=0))
    assert first_miss(none) == pytest.approx(1.0, abs=0.02)


RUNS: dict[str, dict[str, Any]] = {"untouched": {}, "again": {"fit_tokens": 512}}


def test_a_resumed_run_is_not_fitted_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = on_base(tmp_path, base, max_steps=4, checkpoint_every=1)

    class Killed(Exception):
        pass

    def watched(run: Any, update: Any = loop.train_step) -> Any:
        if run.state.step == 2:
            raise Killed
        return update(run)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", watched)
        with pytest.raises(Killed):
            train(settings)
    folder = next((tmp_path / "outputs").glob("*/small"))
    seen: list[str] = []
    train(settings, resume=folder, on_event=lambda event: seen.append(event.message))
    assert not any("Fitting" in message for message in seen)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.fit_tokens=100"], "fit_tokens"),
        (["model.score=update_size", "training.fit_tokens=100"], r"model\.base is empty"),
        (["model.base=x", "training.fit_tokens=100"], "there is no forecast to fit"),
        (["model.base=x", "model.score=update_size", "training.fit_tokens=-1"], "fit_tokens"),
        (["model.base=x", "model.score=update_size", "training.fit_tokens=some"], "fit_tokens"),
    ],
)
def test_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings("quickstart", overrides)


def test_conversion_alone(base: Path, tmp_path: Path) -> None:
    """No update: a model that is fitted, calibrated, measured and saved."""
    fitted = train(on_base(tmp_path / "fitted", base, max_steps=0))
    assert fitted.steps == 0
    model = load_model(str(fitted.final_model_path))
    assert model.is_fitted
    assert model.is_calibrated
    assert (fitted.run_dir / "curves.png").exists()
    dense = load_model(str(base))
    for name, parameter in dense.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
