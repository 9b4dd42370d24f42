"""Trackers hear the lines of metrics.jsonl; a fake one shows the protocol, real ones are read back where installed."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, MagicMock, create_autospec

import pytest

from dtfcli.errors import ConfigError, DTFError
from dtfcli.experiment import train
from dtfcli.runs.files import read_metrics
from dtfcli.settings import Settings
from dtfcli.training import trackers
from dtfcli.training.events import TrainEvent
from dtfcli.training.loop import TrainResult
from dtfcli.training.trackers import check_trackers, tracker_config
from tests.training.small_runs import Killed, kill_at, resume, small_settings, the_run

ENABLED = {"wandb": {"enabled": True, "project": "cats"}}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A package that takes every call of W&B's; its only run is `wandb.init.return_value`."""

    def init(**options: Any) -> Any:
        print("a library that prints")  # noqa: T201
        return DEFAULT

    fake = MagicMock(name="wandb", __spec__=ModuleSpec("wandb", None, origin="fake"))
    fake.init.side_effect = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return fake


def lines_of(wandb: MagicMock) -> list[tuple[int, dict[str, Any]]]:
    """The lines that W&B has received."""
    return [(call.kwargs["step"], call.args[0]) for call in wandb.init.return_value.log.call_args_list]


def settings_with(folder: Path, logging: dict[str, Any], **groups: Any) -> Settings:
    return small_settings(folder, "dense", **{"logging": logging, **groups})


def finite(result: TrainResult) -> list[tuple[int, dict[str, Any]]]:
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    return [(line.pop("step"), {key: value for key, value in line.items() if value is not None}) for line in lines]


def test_a_resumed_run_goes_on_in_the_same_tracker_run(tmp_path: Path, wandb: MagicMock, capsys: Any) -> None:
    """The tracker hears the lines of the log, and settings without traces of this machine."""
    with pytest.raises(Killed):
        train(settings_with(tmp_path, ENABLED), on_event=kill_at("step", 5))
    wandb.init.return_value.finish.assert_called_once()  # also when the run is torn down
    result = resume(the_run(tmp_path))
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert (first["project"], first["name"], first["dir"]) == ("cats", "small", str(result.run_dir))
    assert first["id"] == second["id"] == json.loads((result.run_dir / "trackers.json").read_text())["wandb"]
    assert second["resume"] == "allow"
    assert wandb.init.return_value.finish.call_count == 2
    assert lines_of(wandb) == finite(result)
    (config,) = (call.args[0] for call in wandb.config.update.call_args_list)
    assert config["training.max_steps"] == 6
    assert config["training.betas"] == "[0.9, 0.95]"
    assert str(tmp_path) not in json.dumps(config)
    assert capsys.readouterr().out == ""


def test_a_tracker_that_fails_on_the_way_is_left_out(tmp_path: Path, wandb: MagicMock) -> None:
    """The others and the training go on."""
    pytest.importorskip("tensorboard")
    log = wandb.init.return_value.log
    log.side_effect = [None, None, ConnectionError("no route to host\nmore")]
    events: list[TrainEvent] = []
    result = train(settings_with(tmp_path, ENABLED | {"tensorboard": {"enabled": True}}), on_event=events.append)
    assert [step for step, _ in lines_of(wandb)] == [0, 1, 2]
    warnings = [event.message for event in events if event.kind == "warning"]
    assert warnings == ["logging.wandb: it failed and is left out from here on (no route to host)."]
    assert_tensorboard_has(result)


def test_one_that_does_not_start(tmp_path: Path, wandb: MagicMock) -> None:
    wandb.init.side_effect = RuntimeError("entity cats not found")
    with pytest.raises(DTFError, match=r"logging\.wandb\.enabled = true: .* \(entity cats not found\)"):
        train(settings_with(tmp_path, ENABLED))
    assert not list((tmp_path / "outputs").rglob("settings.toml")), "no run that never began"


@pytest.mark.parametrize("name", trackers.NAMES)
def test_a_missing_package_is_named_before_anything_begins(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"logging\.{name}\.enabled = true: .* pip install 'dtfcli\[{name}\]'"):
        train(settings_with(tmp_path, {name: {"enabled": True}}))
    assert not (tmp_path / "outputs").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: Any) -> None:
    """W&B itself makes a folder `wandb` where it runs."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ConfigError, match="not installed"):
        check_trackers(settings_with(tmp_path, {"trackio": {"enabled": True}}))


def test_not_logged_in(tmp_path: Path, wandb: MagicMock, monkeypatch: Any) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.login = create_autospec(lambda prompt=True, verify=True: None, return_value=False)
    wandb.setup.return_value.settings.mode = "online"
    with pytest.raises(ConfigError, match=r"wandb login.*WANDB_MODE=offline"):
        check_trackers(settings_with(tmp_path, ENABLED))
    wandb.login.assert_called_once_with(prompt=False, verify=False)
    wandb.setup.return_value.settings.mode = "offline"
    check_trackers(settings_with(tmp_path, ENABLED))


def test_configuration_is_flat_and_public(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, {}, hub={"repo": "me/model"}, eval={"after": "sciq", "data_dir": str(tmp_path)})
    config = tracker_config(settings, tmp_path)
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert not any(key.startswith("hub") or key.endswith("_dir") for key in config)
    assert str(tmp_path) not in json.dumps(config)
    assert "local text (.jsonl)" in str(config["data.sources"])


def assert_tensorboard_has(result: TrainResult) -> None:
    """All lines of metrics.jsonl, each once."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(result.run_dir / "tensorboard"))
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, values in finite(result):
        for name, value in values.items():
            expected.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    assert set(expected) <= set(events.Tags()["scalars"])
    for name, points in expected.items():
        if name not in ("tokens_per_second", "mfu"):
            assert [(point.step, point.value) for point in events.Scalars(name)] == points, name


def test_tensorboard_for_real(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(Killed):
        train(settings_with(tmp_path, {"tensorboard": {"enabled": True}}), on_event=kill_at("step", 5))
    assert_tensorboard_has(resume(the_run(tmp_path)))


def test_the_path_is_the_last_line_with_all_trackers(tmp_path: Path) -> None:
    """In a process of its own, since libraries print when it ends; W&B offline."""
    for name in trackers.NAMES:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    logging = {name: {"enabled": True} for name in trackers.NAMES}
    (tmp_path / "run.toml").write_text(settings_with(tmp_path, logging).to_toml())
    command = [sys.executable, "-m", "dtfcli", "train", "--config", str(tmp_path / "run.toml")]
    environment = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].endswith("final_model")
    assert "Upload" not in process.stdout
    run = the_run(tmp_path)
    identity = json.loads((run / "trackers.json").read_text())["wandb"]
    (file,) = (run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    assert b"train/loss" in file.read_bytes()
    assert list((tmp_path / "trackio").rglob("dtf*.db"))
