"""`dtf train` from the outside."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dtfcli.cli.train_view import sparkline
from dtfcli.training import loop
from dtfcli.training.run import Run
from tests.conftest import Outcome
from tests.training.small_runs import small_settings

Dtf = Callable[..., Outcome]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A settings file for a run of three updates; the test runs beside it."""
    monkeypatch.chdir(tmp_path)
    settings = small_settings(tmp_path, run={"output_dir": "outputs"}, training={"max_steps": 3, "log_every": 1})
    (tmp_path / "small.toml").write_text(settings.to_toml())
    return "small.toml"


def test_the_last_line_is_the_final_model(dtf: Dtf, config: str) -> None:
    result = dtf("train", "--config", config, "run.name=mine")
    assert result.code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    model = Path(result.stdout.strip())
    assert model.name == "final_model"
    assert model.parent.name == "mine"
    for shown in ("step 3/3", "validation loss", "unigram", "routed share", "A sample", str(model.parent)):
        assert shown in result.stderr
    assert result.stderr.strip().splitlines()[-2:] == ["Next:", f"  dtf inspect-routing {model.parent}"]
    assert "\x1b" not in result.stderr

    again = dtf("train", "--config", config, "run.name=mine")
    assert again.code == 2
    assert "run.name=mine-2" in again.stderr
    assert len(again.stderr.strip().splitlines()) <= 2


def test_after_a_dense_model_comes_its_conversion(dtf: Dtf, tmp_path: Path) -> None:
    settings = small_settings(tmp_path, "dense", training={"max_steps": 2, "learning_rates": {"base": 1e-2}})
    (tmp_path / "dense.toml").write_text(settings.to_toml())
    result = dtf("train", "--config", str(tmp_path / "dense.toml"))
    assert result.code == 0, result.stderr
    run, text = Path(result.stdout.strip()).parent, tmp_path / "text.jsonl"
    assert result.stderr.strip().splitlines()[-1] == f"  dtf convert {run} -o {run}/routed --text {text}"


def test_interrupted_and_resumed(dtf: Dtf, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.train_step
    stopped: list[bool] = []

    def stop_once(run: Run) -> dict[str, object]:
        if run.state.step == 1 and not stopped:
            stopped.append(True)
            run.stop.requested = True
        return step(run)

    monkeypatch.setattr(loop, "train_step", stop_once)
    first = dtf("train", "--config", config)
    assert (first.code, first.stdout) == (130, "")
    command = first.stderr.strip().splitlines()[-1].partition("Go on with: dtf ")[2].split()
    assert command[:2] == ["train", "--resume"]

    second = dtf("train", "--resume", "--json")  # the newest run
    assert second.code == 0, second.stderr
    document = json.loads(second.stdout)
    assert {"run_dir", "final_model_path", "best_model_path", "metrics", "steps"} <= set(document)
    assert (document["final_model_path"], document["steps"]) == (f"{command[2]}/final_model", 3)
    assert "on from step 2" in second.stderr

    finished = dtf(*command)
    assert finished.code == 2
    assert "has finished" in finished.stderr


def test_dry_run(dtf: Dtf, config: str) -> None:
    result = dtf("train", "--config", config, "--dry-run")
    assert result.code == 0
    rows = ("max_steps = 3", "parameters", "trainable", "FLOPs per token", "share of dense", "memory")
    for shown in (*rows, "tokens per update"):
        assert shown in result.stdout
    again = dtf("train", "--config", config, "--dry-run", "--json")
    assert json.loads(again.stdout)["settings"]["training"]["max_steps"] == 3
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["small.toml", "text.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a Unix thing")
def test_the_live_view_in_a_terminal(config: str) -> None:
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dtfcli", "train", "--config", config],
        stdout=subprocess.PIPE,
        stderr=child,
        text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
    )
    os.close(child)
    drawn = b""
    with suppress(OSError):  # the other end is closed
        while part := os.read(parent, 65536):
            drawn += part
    output, _ = process.communicate()
    assert process.returncode == 0, drawn.decode()
    assert output.strip().endswith("final_model")
    text = drawn.decode()
    assert "validation loss" in text
    assert "\x1b[?25l" in text  # the cursor is hidden while the panel is drawn
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_sparkline() -> None:
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([float(x) for x in range(1000)], 48)) == 48
    assert sparkline([2.0, 2.0], 10) == "▁▁"
