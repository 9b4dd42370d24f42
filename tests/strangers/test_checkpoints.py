"""Checkpoints of strangers: resuming from one runs none of what they put into it, and says which checkpoint it was.

The hashes of a checkpoint protect against damage alone: who writes a file writes its hash, too.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dtfcli.cli.train as train_command
from dtfcli.errors import CheckpointError
from dtfcli.experiment import train
from dtfcli.runs.folder import list_checkpoints
from dtfcli.settings import load_settings
from dtfcli.training import checkpoint as checkpoints
from tests.training.small_runs import small_settings


class Runs:
    """Its pickle runs code where it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


# ------------------------------------------------------------------ a run of one process


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Settings and folder of a run that stopped before its end."""
    settings = small_settings(tmp_path_factory.mktemp("stopped"), training={"max_steps": 4})
    run = train(settings).run_dir
    shutil.rmtree(run / "final_model")
    return settings, run


def rehash(folder: Path) -> None:
    """Let a checkpoint's list of hashes fit its files."""
    path = folder / "state.json"
    document = json.loads(path.read_text())
    files = [file for file in folder.rglob("*") if file.is_file() and file != path]
    document["sha256"] = {file.relative_to(folder).as_posix(): checkpoints._hash(file) for file in files}
    path.write_text(json.dumps(document))


def spoil(run: Path, target: Path, name: str, content: Callable[[Path], None]) -> Path:
    """A copy of a run whose newest checkpoint has another file `name`; returns the checkpoint."""
    shutil.copytree(run, target)
    newest = list_checkpoints(target)[0]
    if name == "pytorch_model.bin":
        (newest / "model.safetensors").unlink()
    content(newest / name)
    rehash(newest)
    return newest


def test_an_honest_run_goes_on(stopped: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = stopped
    shutil.copytree(run, tmp_path / "run")
    assert train(settings, resume=tmp_path / "run").final_model_path.is_dir()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("pytorch_model.bin", True),
        ("optimizer.bin", False),
        ("random_states_0.pkl", True),
        ("random_states_0.pkl", False),
    ],
)
def test_no_file_of_a_checkpoint_runs(stopped: tuple[Any, Path], tmp_path: Path, name: str, plain: bool) -> None:
    settings, run = stopped
    marker = tmp_path / "ran"
    hostile = {"x": Runs(marker)}

    def write(path: Path) -> None:
        if plain:
            path.write_bytes(pickle.dumps(hostile))
        else:
            torch.save(hostile, path)

    newest = spoil(run, tmp_path / "run", name, write)
    with pytest.raises(CheckpointError, match="nothing in it was run") as caught:
        train(settings, resume=tmp_path / "run")
    assert f"delete {newest}" in str(caught.value)
    assert not marker.exists()


def test_a_state_that_nobody_asked_for_is_not_opened(stopped: tuple[Any, Path], tmp_path: Path) -> None:
    """`accelerate` opens files of this name without a limit, if as many objects were registered."""
    settings, run = stopped
    marker = tmp_path / "ran"
    spoil(run, tmp_path / "run", "custom_checkpoint_0.pkl", lambda path: torch.save(Runs(marker), path))
    with pytest.raises(CheckpointError, match="of another run"):
        train(settings, resume=tmp_path / "run")
    assert not marker.exists()


def test_random_states_that_are_none_are_noticed(stopped: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = stopped
    spoil(run, tmp_path / "run", "random_states_0.pkl", lambda path: torch.save({"step": 3}, path))
    with pytest.raises(CheckpointError, match=r"random_states_0\.pkl holds no states of random generators"):
        train(settings, resume=tmp_path / "run")


def test_settings_of_a_run_do_not_speak_for_its_user(dtf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own settings may say that code is trusted; whoever resumes it says so again."""
    settings = load_settings(None, ["model.base=./theirs", "model=dense", "model.trust_remote_code=true"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.toml").write_text(settings.to_toml())
    began: list[Any] = []
    monkeypatch.setattr(train_command, "_train", lambda settings, *_, **__: began.append(settings))
    refused = dtf("train", "--resume", str(tmp_path / "run"))
    assert refused.code == 2
    assert "settings.toml: model.trust_remote_code = true: code that comes with ./theirs" in refused.stderr
    assert "add --trust-remote-code" in refused.stderr
    assert began == []
    dtf("train", "--resume", str(tmp_path / "run"), "--trust-remote-code")
    assert began == [settings]
