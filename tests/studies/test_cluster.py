"""Studies as jobs, by submitit's local executor: submitted, left, asked again; a job that is put back continues."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dtfcli.errors import ConfigError
from dtfcli.runs.files import read_metrics
from dtfcli.studies.cluster import parse_options
from tests.conftest import Outcome
from tests.studies.test_compare import command

Dtf = Callable[..., Outcome]
__all__ = ["command"]


def test_options_are_submitits() -> None:
    assert parse_options("slurm", ["partition=gpu", "gpus=2", "time=1-02:30:00", "memory=64"]) == {
        "slurm_partition": "gpu",
        "gpus_per_node": 2,
        "timeout_min": 26 * 60 + 30,
        "mem_gb": 64,
    }
    assert parse_options("slurm", [])["gpus_per_node"] == 1
    assert "gpus_per_node" not in parse_options("local", [])


@pytest.mark.parametrize(("text", "minutes"), [("90", 90), ("2:30", 150), ("2:30:00", 150), ("1-0:00", 1440)])
def test_times(text: str, minutes: int) -> None:
    assert parse_options("local", [f"time={text}"])["timeout_min"] == minutes


@pytest.mark.parametrize(
    ("cluster", "option", "message"),
    [
        ("slrm", "", "--cluster slrm: choose from slurm, local"),
        ("slurm", "partition", "write KEY=VALUE"),
        ("slurm", "partition=", "write KEY=VALUE"),
        ("slurm", "partitoin=gpu", "Did you mean 'partition'?"),
        ("slurm", "gpus=two", "a whole number"),
        ("slurm", "time=soon", "H:MM:SS"),
    ],
)
def test_wrong_options(cluster: str, option: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_options(cluster, [option] if option else [])
    assert message in str(found.value)


def test_wrong_commands(dtf: Dtf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    vary = ("compare", "quickstart", "--vary", "model=mod,dense")
    for arguments, message in (
        (("--cluster-option", "partition=gpu"), "without --cluster nothing reads it"),
        (("--cluster", "slurm", "--cluster-option", "gpus=1", "--cluster-option", "gpus=2"), "named twice"),
        (("--cluster", "slurm"), "Start it on a machine that can submit jobs"),
    ):
        result = dtf(*vary, *arguments)
        assert result.code == 2
        assert message in " ".join(result.stderr.split())


@pytest.mark.slow
def test_submitted_left_put_back_and_asked_again(dtf: Dtf, command: list[str]) -> None:
    """With the signal that Slurm sends before a time limit or a preemption: save, queue again, go on from there."""
    longer = [item.replace("max_steps=4", "max_steps=200").replace("every=1", "every=100") for item in command]
    arguments = [*longer, "--vary", "model=mod,dense", "--seeds", "1", "--no-bench", "--cluster", "local", "--json"]
    first = dtf(*arguments)
    assert first.code == 0, first.stderr
    assert [run["state"] for run in json.loads(first.stdout)["runs"]] == ["submitted", "submitted"]
    assert "Start the same command again" in first.stderr
    jobs = json.loads(Path("study/jobs/jobs.json").read_text())
    name, number = next(iter(jobs.items()))
    assert name.startswith("mod")

    def metrics() -> list[dict[str, float]]:
        found = list(Path("study").glob(f"*/{name}/metrics.jsonl"))
        return read_metrics(found[0]) if found else []

    wait_for(lambda: any(line["step"] >= 10 for line in metrics()))
    (task,) = psutil.Process(int(number)).children()
    task.send_signal(signal.SIGUSR2)
    task.wait(60)
    assert max(line["step"] for line in metrics()) < 200
    asked = json.loads(dtf(*arguments).stdout)
    assert {run["state"] for run in asked["runs"]} <= {"waiting", "training", "finished"}

    def ask_until_reported() -> bool:
        asked.update(json.loads(dtf(*arguments).stdout))
        return "rows" in asked

    wait_for(ask_until_reported)
    assert [row["name"] for row in asked["rows"]] == ["mod", "dense"]
    assert "preempted" in next(Path(f"study/jobs/{number}").glob("*.err")).read_text()
    steps = [line["step"] for line in metrics() if "train/loss" in line]
    assert steps == sorted(set(steps)), "no step was done twice: the checkpoint was of the moment of the signal"
    assert json.loads(Path("study/jobs/jobs.json").read_text()) == jobs, "nothing was submitted twice"


@pytest.mark.slow
def test_a_job_that_failed_is_named_with_its_log(dtf: Dtf, command: list[str]) -> None:
    arguments = [*command, "--vary", "model=mod,dense", "--seeds", "1", "--no-bench", "--cluster", "local"]
    assert dtf(*arguments).code == 0
    jobs = json.loads(Path("study/jobs/jobs.json").read_text())
    kill(jobs)
    failed = dtf(*arguments)
    assert failed.code == 1
    assert "ended before it was finished" in failed.stderr
    assert all(name in "".join(failed.stderr.split()) for name in jobs)
    again = dtf(*arguments, "--json")
    assert again.code == 0, again.stderr
    assert {run["state"] for run in json.loads(again.stdout)["runs"]} == {"submitted"}
    kill(json.loads(Path("study/jobs/jobs.json").read_text()))


def kill(jobs: dict[str, str]) -> None:
    for number in jobs.values():
        controller = psutil.Process(int(number))
        for process in (controller, *controller.children(recursive=True)):
            process.kill()
            process.wait(30)


def wait_for(holds: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.3)
