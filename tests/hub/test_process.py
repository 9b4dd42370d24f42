"""The commands as a user runs them: in processes of their own, told by the environment where the Hub is."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtfcli.experiment import train
from dtfcli.training.events import TrainEvent
from tests.conftest import Outcome
from tests.hub.conftest import TOKEN
from tests.hub.standin import Fault, Hub
from tests.training.small_runs import small_settings


def _environment(server: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    dropped = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    told = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return kept | told | ({"HF_TOKEN": token} if token else {})


def _dtf(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtfcli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_a_push_of_a_process(server: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    server.faults = [Fault("commit", 429, times=1, retry_after=1)]
    result = _dtf(_environment(server, tmp_path), "push", str(saved["dtf"]), "new", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["url"] == f"{server.url}/me/new"
    assert len(server.messages("me/new")) == 2
    assert "trying again in 1 s" in result.stderr
    assert "%|" not in result.stderr  # no bars in a pipe


def test_a_process_without_a_token(server: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    result = _dtf(_environment(server, tmp_path, token=None), "push", str(saved["dense"]), "me/new")
    assert result.returncode == 2
    assert result.stderr == "Error: not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN.\n"
    assert server.requests == []


@pytest.mark.slow
def test_ctrl_c_ends_a_push_with_130_and_no_model(server: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    server.faults = [Fault("commit", 429, times=1, retry_after=50)]
    command = [sys.executable, "-m", "dtfcli", "push", str(saved["dense"]), "me/new"]
    process = subprocess.Popen(
        command,
        env=_environment(server, tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while "commit" not in server.requests and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # into its wait
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert server.files("me/new") == {}


@pytest.mark.slow
def test_a_run_pushes_its_final_model(hub: Hub, tmp_path: Path) -> None:
    result = train(small_settings(tmp_path, hub={"repo": "from-a-run", "private": True}))
    assert result.hub_url == f"{hub.url}/me/from-a-run"
    files = hub.files("me/from-a-run")
    assert files["model.safetensors"] == (result.final_model_path / "model.safetensors").read_bytes()
    assert {"curves.png", "README.md"} <= set(files)
    assert hub.repositories["me/from-a-run"].private
    assert b"from-a-run" not in files["README.md"].split(b"<details>")[1].split(b"</details>")[0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault("commit", 403), Fault("whoami", cut="before")], ids=["refused", "no network"])
def test_a_push_that_fails_does_not_lose_the_run(hub: Hub, tmp_path: Path, fault: Fault) -> None:
    hub.faults = [fault]
    events: list[TrainEvent] = []
    result = train(small_settings(tmp_path, hub={"repo": "me/new", "private": True}), on_event=events.append)
    assert result.hub_url is None
    assert (result.final_model_path / "model.safetensors").is_file()
    warning = next(event.message for event in reversed(events) if event.kind == "warning")
    assert f"dtf push {result.final_model_path} me/new --private" in warning
    assert "me/new" not in hub.repositories or hub.files("me/new") == {}


@pytest.mark.slow
def test_a_run_that_could_not_push_says_so_at_its_start(hub: Hub, logged_out: None, tmp_path: Path) -> None:
    events: list[TrainEvent] = []
    train(small_settings(tmp_path, hub={"repo": "me/new"}), on_event=events.append)
    kinds = [event.kind for event in events]
    first = next(event for event in events if event.kind == "warning")
    assert "hf auth login" in first.message
    assert kinds.index("warning") < kinds.index("step")
    assert "not logged in" in [event.message for event in events if event.kind == "warning"][-1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hub.repo=a/b/c", ["hub.repo", "owner/name"]),
        ("hub.repo='not good'", ["hub.repo", "owner/name"]),
        ("hub.private=true", ["hub.private", "nothing reads it", "hub.repo is empty"]),
        ("hub.rpo=x", ["hub.rpo", "Did you mean 'hub.repo'"]),
    ],
)
def test_settings_of_the_hub(dtf: Callable[..., Outcome], override: str, words: list[str]) -> None:
    result = dtf("train", "quickstart", override, "--dry-run")
    assert result.code == 2
    assert all(word in result.stderr for word in words), result.stderr
