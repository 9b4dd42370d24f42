"""The fit of a run before its first step, and when there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.experiment import train
from dtfcli.loading.load import load_model
from dtfcli.models.pretrained import is_added
from dtfcli.runs.files import read_metrics
from dtfcli.settings import Settings
from dtfcli.training import loop
from tests.training.small_runs import Killed, kill_at, resume, small_settings, the_run

FIELDS = {"architecture": "dtf", "score": "forecast_error", "bypass": "forecast"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that has learned a little."""
    training = {"max_steps": 12, "eval_every": 12}
    return train(small_settings(tmp_path_factory.mktemp("base"), "dense", training=training)).final_model_path


def on_base(folder: Path, base: Path, lora: bool = False, **training: Any) -> Settings:
    small = small_settings(folder, training={"max_steps": 2, "log_every": 1, "weight_decay": 0.0} | training)
    values = small.model_dump(exclude_none=True, exclude={"model"})
    return Settings.model_validate(values | {"model": FIELDS | {"base": str(base)}, "lora": {"enabled": lora}})


def first_miss(run: Path) -> float:
    lines = read_metrics(run / "metrics.jsonl")
    return next(line["train/forecast_loss"] for line in lines if "train/loss" in line)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_begins_with_what_it_has_fitted(
    lora: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone does not move; the first step has forecasts; the run reports the fit."""
    started: dict[str, torch.Tensor] = {}
    messages: list[str] = []

    def watched(run: Any, fit: Any = loop.fit) -> None:
        started.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
        fit(run)

    monkeypatch.setattr(loop, "fit", watched)
    result = train(on_base(tmp_path, base, lora), on_event=lambda event: messages.append(event.message))
    assert first_miss(result.run_dir) < 0.8
    assert "Fitting forecasts and predicted costs" in messages
    dense = load_model(str(base))
    for name, parameter in dense.named_parameters():
        ours = started.get(name, started.get(name.replace(".weight", ".base_layer.weight")))
        assert ours is not None, name
        assert torch.equal(ours, parameter), name
    assert any(is_added(name) and "forecast" in name and p.any() for name, p in started.items())


def test_a_fitted_model_is_kept(base: Path, tmp_path: Path) -> None:
    """Without a step a run fits, calibrates, measures and saves. A routed base is fitted again only on request."""
    fitted = train(on_base(tmp_path / "fitted", base, max_steps=0))
    assert fitted.steps == 0
    model = load_model(str(fitted.final_model_path))
    assert model.is_fitted
    assert model.is_calibrated
    assert (fitted.run_dir / "curves.png").exists()
    for name, parameter in load_model(str(base)).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    untouched, again = (
        train(on_base(tmp_path / f"fit-{tokens}", fitted.final_model_path, fit_tokens=tokens)) for tokens in (None, 512)
    )
    assert first_miss(untouched.run_dir) != first_miss(again.run_dir)


def test_a_resumed_run_is_not_fitted_again(base: Path, tmp_path: Path) -> None:
    """Nor is a run whose settings ask for no fit."""
    with pytest.raises(Killed):
        train(on_base(tmp_path, base, max_steps=3, checkpoint_every=1, fit_tokens=0), on_event=kill_at("step", 2))
    assert first_miss(the_run(tmp_path)) == pytest.approx(1.0, abs=0.02)
    settings = the_run(tmp_path) / "settings.toml"
    settings.write_text(settings.read_text().replace("fit_tokens = 0", "fit_tokens = 512"))
    messages: list[str] = []
    resume(the_run(tmp_path), lambda event: messages.append(event.message))
    assert not any("Fitting" in message for message in messages)
