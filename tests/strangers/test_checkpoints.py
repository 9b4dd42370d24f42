"""Checkpoints of strangers: resuming from one runs none of what they put into it, and says which file it was.

The hashes of a checkpoint protect against damage alone: who writes a file writes its hash, too.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import dtfcli.cli.train as train_command
from dtfcli.errors import CheckpointError
from dtfcli.experiment import train
from dtfcli.runs.folder import list_checkpoints
from dtfcli.settings import load_settings
from dtfcli.training import checkpoint as checkpoints
from dtfcli.training.stored_states import METADATA, load_shards
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
    assert str(newest / name) in str(caught.value)
    assert f"delete {newest}" in str(caught.value)
    assert not marker.exists()


def test_a_state_that_nobody_asked_for_is_not_opened(stopped: tuple[Any, Path], tmp_path: Path) -> None:
    """`accelerate` opens files of this name without a limit, if as many objects were registered."""
    settings, run = stopped
    marker = tmp_path / "ran"
    spoil(run, tmp_path / "run", "custom_checkpoint_0.pkl", lambda path: torch.save(Runs(marker), path))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(settings, resume=tmp_path / "run")
    assert not marker.exists()


def test_random_states_that_are_none_are_noticed(stopped: tuple[Any, Path], tmp_path: Path) -> None:
    settings, run = stopped
    spoil(run, tmp_path / "run", "random_states_0.pkl", lambda path: torch.save({"step": 3}, path))
    with pytest.raises(CheckpointError, match=r"random_states_0\.pkl: .*no states of random generators"):
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


# ------------------------------------------------------------------ shards


def states_of(steps: int) -> tuple[Any, Any, dict[str, Any]]:
    """A model after some updates, its optimizer, and what is saved of them."""
    torch.manual_seed(steps)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * steps)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    return model, optimizer, {"model": weights, "optimizer": states}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """What `Sharded.save` writes, here by one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed is off
        dcp.save(states_of(3)[2], checkpoint_id=tmp_path / "step-000003" / "shards")
    return tmp_path / "step-000003" / "shards"


def read(folder: Path) -> tuple[Any, Any]:
    model, optimizer, states = states_of(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_shards(states, folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return model, optimizer


def test_honest_shards_are_read(shards: Path) -> None:
    expected_model, expected_optimizer, _ = states_of(3)
    model, optimizer = read(shards)
    assert torch.equal(model.weight, expected_model.weight)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    assert str(optimizer.state_dict()["state"]) == str(expected_optimizer.state_dict()["state"])


def poison() -> bytes:
    """A pickle that sets an attribute of a class which `.metadata` may name."""
    return b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x01\x00\x00\x00aK\x01stb."


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "code": lambda marker: pickle.dumps(Runs(marker)),
    "code inside": lambda marker: pickle.dumps(kinds.Metadata({}, planner_data=Runs(marker), storage_data={})),
    "code in the oldest protocol": lambda marker: pickle.dumps(Runs(marker), protocol=0),
    "a builtin": lambda marker: b"cbuiltins\neval\n(S'open(%r, \"w\")'\ntR." % str(marker).encode(),
    "a class changed": lambda marker: poison(),
    "something else": lambda marker: pickle.dumps({"a": 1}),
    "no pickle": lambda marker: b"PK",
    "nothing": lambda marker: b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_run_nothing(shards: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    (shards / METADATA).write_bytes(HOSTILE[name](marker))
    with pytest.raises(CheckpointError, match=r"shards/\.metadata: .*nothing in it was run") as caught:
        read(shards)
    assert f"delete {shards.parent}" in str(caught.value)
    assert not marker.exists()
    assert not hasattr(kinds.Metadata, "a")


def test_metadata_of_one_process_are_not_opened_instead(shards: Path, tmp_path: Path) -> None:
    """They are what torch looks for where `.metadata` cannot be read."""
    marker = tmp_path / "ran"
    (shards / METADATA).unlink()
    (shards / "__0.metadata").write_bytes(pickle.dumps(Runs(marker)))
    with pytest.raises(CheckpointError, match=r"\.metadata: .*No such file"):
        read(shards)
    assert not marker.exists()


@pytest.mark.parametrize("entry", ["lr", "weight"])
def test_entries_run_nothing(shards: Path, tmp_path: Path, entry: str) -> None:
    marker = tmp_path / "ran"
    torch.save({"x": Runs(marker)}, shards / "theirs.distcp")
    metadata = pickle.loads((shards / METADATA).read_bytes())
    for index, place in metadata.storage_data.items():
        if index.fqn.endswith(entry):
            place.relative_path, place.offset = "theirs.distcp", 0
            place.length = (shards / "theirs.distcp").stat().st_size
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"shards: .*nothing in it was run \(.*Weights only"):
        read(shards)
    assert not marker.exists()


@pytest.mark.parametrize("linked", [True, False])
def test_shards_outside_their_folder(shards: Path, tmp_path: Path, linked: bool) -> None:
    (name,) = [path.name for path in shards.glob("*.distcp")]
    (shards / name).rename(tmp_path / name)
    if linked:
        (shards / name).symlink_to(tmp_path / name)
    else:
        metadata = pickle.loads((shards / METADATA).read_bytes())
        for place in metadata.storage_data.values():
            place.relative_path = f"../../{name}"
        (shards / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="out of its folder" if linked else "outside its folder"):
        read(shards)


def test_shards_of_another_model(shards: Path) -> None:
    states = {"model": {"other": torch.ones(2)}, "optimizer": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=r"shards: .*other"):
            load_shards(states, shards)
