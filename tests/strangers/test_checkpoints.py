"""Checkpoints of strangers: resuming from one runs none of what they put into it, and says which checkpoint it was.

The hashes of a checkpoint protect against damage alone: who writes a file writes its hash, too.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dtfcli.cli.train as train_command
from dtfcli.errors import CheckpointError
from dtfcli.experiment import train
from dtfcli.runs.folder import list_checkpoints, run_settings
from dtfcli.settings import load_settings
from dtfcli.training.checkpoint import read_state
from tests.strangers.damage import write_pickle


@pytest.fixture
def stopped(healthy: Path, tmp_path: Path) -> Path:
    """A run that stopped before its end."""
    run = shutil.copytree(healthy / "small/run", tmp_path / "run")
    shutil.rmtree(run / "final_model")
    return run


def spoil(run: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Let a run's newest checkpoint have another file `name`, and fitting hashes; returns the checkpoint."""
    newest = list_checkpoints(run)[0]
    if name == "pytorch_model.bin":
        (newest / "model.safetensors").unlink()
    write(newest / name)
    state = json.loads((newest / "state.json").read_text())
    files = [file for file in newest.rglob("*") if file.is_file() and file.name != "state.json"]
    hashes = {file.relative_to(newest).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (newest / "state.json").write_text(json.dumps(state | {"sha256": hashes}))
    assert read_state(newest).step == 4, "the hashes fit"
    return newest


def test_an_honest_run_goes_on(stopped: Path) -> None:
    assert train(run_settings(stopped), resume=stopped).final_model_path.is_dir()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("pytorch_model.bin", "pickle", "nothing in it was run.*delete {}"),
        ("optimizer.bin", "torch", "nothing in it was run.*delete {}"),
        ("random_states_0.pkl", "pickle", "nothing in it was run.*delete {}"),
        ("random_states_0.pkl", "torch", "nothing in it was run.*delete {}"),
        ("custom_checkpoint_0.pkl", "torch", "of another run"),  # `accelerate` opens it without a limit
        ("random_states_0.pkl", "plain values", r"random_states_0\.pkl holds no states of random generators"),
    ],
)
def test_no_file_of_a_checkpoint_runs(stopped: Path, tmp_path: Path, name: str, kind: str, message: str) -> None:
    def write(path: Path) -> None:
        if kind == "plain values":
            torch.save({"step": 3}, path)
        else:
            write_pickle(path, tmp_path / "ran", plain=kind == "pickle")

    newest = spoil(stopped, name, write)
    with pytest.raises(CheckpointError, match=rf"(?s){message.format(newest)}"):
        train(run_settings(stopped), resume=stopped)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_vouches_for_its_own_files_alone(stopped: Path) -> None:
    folder = list_checkpoints(stopped)[0]
    state = json.loads((folder / "state.json").read_text())
    for name, message in (
        ("loop", "loop is missing"),
        ("../../settings.toml", r"settings\.toml lies outside its folder"),
    ):
        (folder / "state.json").write_text(json.dumps(state | {"sha256": {name: "x"}}))
        (folder / "loop").unlink(missing_ok=True)
        (folder / "loop").symlink_to("loop")
        with pytest.raises(ValueError, match=message):
            read_state(folder)


def test_settings_of_a_run_do_not_speak_for_its_user(dtf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own settings may say that code is trusted; whoever resumes it says so again."""
    settings = load_settings(None, ["model.base=./theirs", "model=dense", "model.trust_remote_code=true"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.toml").write_text(settings.to_toml())
    began: list[Any] = []
    monkeypatch.setattr(train_command, "_train", lambda settings, *_, **__: began.append(settings))
    refused = dtf("train", "--resume", str(tmp_path / "run"))
    assert (refused.code, began) == (2, [])
    assert "settings.toml: model.trust_remote_code = true: code that comes with ./theirs" in refused.stderr
    assert "add --trust-remote-code" in refused.stderr
    dtf("train", "--resume", str(tmp_path / "run"), "--trust-remote-code")
    assert began == [settings]
