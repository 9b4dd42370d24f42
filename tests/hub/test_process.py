"""The commands as a user runs them, and what a run does with `hub.repo`."""

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


@pytest.mark.slow
def test_ctrl_c_ends_a_push_with_130_and_no_model(server: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    """In a process that knows the Hub from its environment, while it has nothing to do before the next try."""
    server.faults = [Fault("commit", 429, times=1, retry_after=50)]
    dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    process = subprocess.Popen(
        [sys.executable, "-m", "dtfcli", "push", str(saved["dense"]), "me/new"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while "commit" not in server.requests and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "trying again in 50 s" in stderr
    assert "Traceback" not in stderr
    assert "%|" not in stderr  # no bars in a pipe
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
@pytest.mark.parametrize("logged_in", [True, False])
def test_a_push_that_fails_does_not_lose_the_run(
    hub: Hub, tmp_path: Path, logged_in: bool, request: pytest.FixtureRequest
) -> None:
    """Without a login the run says so at its start, when there is time for one."""
    if logged_in:
        hub.faults = [Fault("commit", 403)]
    else:
        request.getfixturevalue("logged_out")
    events: list[TrainEvent] = []
    result = train(small_settings(tmp_path, hub={"repo": "me/new", "private": True}), on_event=events.append)
    assert result.hub_url is None
    assert (result.final_model_path / "model.safetensors").is_file()
    warnings = [event.message for event in events if event.kind == "warning"]
    assert f"dtf push {result.final_model_path} me/new --private" in warnings[-1]
    assert "me/new" not in hub.repositories or hub.files("me/new") == {}
    if not logged_in:
        kinds = [event.kind for event in events]
        assert kinds.index("warning") < kinds.index("step")
        assert "hf auth login" in warnings[0]
        assert "not logged in" in warnings[-1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hub.repo=a/b/c", ["hub.repo", "owner/name"]),
        ("hub.private=true", ["hub.private", "nothing reads it", "hub.repo is empty"]),
    ],
)
def test_settings_of_the_hub(dtf: Callable[..., Outcome], override: str, words: list[str]) -> None:
    result = dtf("train", "quickstart", override, "--dry-run")
    assert result.code == 2
    assert all(word in result.stderr for word in words), result.stderr
