"""Studies as jobs, by submitit's local executor: submitted, left, asked again; a job that is put back continues."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import submitit

from dtfcli.errors import ConfigError
from dtfcli.runs.files import read_metrics
from dtfcli.settings import load_settings
from dtfcli.studies import cluster
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
    ("where", "option", "message"),
    [
        ("slrm", "", "--cluster slrm: choose from slurm, local"),
        ("slurm", "partition", "write KEY=VALUE"),
        ("slurm", "partition=", "write KEY=VALUE"),
        ("slurm", "partitoin=gpu", "Did you mean 'partition'?"),
        ("slurm", "gpus=two", "a whole number"),
        ("slurm", "time=soon", "H:MM:SS"),
        ("local", "gpus=1", "local jobs have no gpus"),
    ],
)
def test_wrong_options(where: str, option: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_options(where, [option] if option else [])
    assert message in str(found.value)


def test_wrong_commands(dtf: Dtf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    vary = ("compare", "quickstart", "--vary", "model=mod,dense")
    for arguments, message in (
        (("--cluster-option", "partition=gpu"), "without --cluster nothing reads it"),
        (("--cluster", "slurm", "--cluster-option", "gpus=1", "--cluster-option", "gpus=2"), "named twice"),
        (("--cluster", "slurm"), "Start it on a machine that can submit jobs"),
        (("--cluster", "local", "--parallel", "2"), "local jobs start at once"),
    ):
        result = dtf(*vary, *arguments)
        assert result.code == 2
        assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("state", "minutes", "alive"),
    [
        ("PENDING", 900, True),
        ("RUNNING", 900, True),
        ("REQUEUED", 0, True),
        ("UNKNOWN", 1, True),
        ("UNKNOWN", 11, False),
        ("CANCELLED by 1000", 1, False),
        ("COMPLETED", 1, False),
        ("NODE_FAIL", 1, False),
    ],
)
def test_what_slurm_says_of_a_job(
    state: str, minutes: int, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitit.SlurmJob, "state", state)
    job = cluster._Job("mod-s1", "slurm", "4567_0", time.time() - 60 * minutes)
    assert job.is_alive(tmp_path) is alive


def test_a_job_stopped_by_sigterm_waits_for_the_signal_to_be_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm sends SIGTERM to all processes before it preempts a job; submitit's signal comes after it."""
    waits: list[float] = []
    monkeypatch.setattr(cluster, "train_command", lambda settings: [sys.executable, "-c", "raise SystemExit(130)"])
    monkeypatch.setattr(cluster.time, "sleep", waits.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    job = cluster.TrainJob(load_settings("quickstart").model_dump_json(), 1)
    with pytest.raises(RuntimeError, match="exit code 130"):
        job()
    assert waits[-1] > 90
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what submitit's local executor does
    assert job._environment()["CUDA_VISIBLE_DEVICES"] == "0,1"


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
    name, number = (next(iter(jobs.values()))[key] for key in ("name", "number"))
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
    assert all(job["name"] in "".join(failed.stderr.split()) for job in jobs.values())
    again = dtf(*arguments, "--json")
    assert again.code == 0, again.stderr
    assert {run["state"] for run in json.loads(again.stdout)["runs"]} == {"submitted"}
    kill(json.loads(Path("study/jobs/jobs.json").read_text()))


def kill(jobs: dict[str, dict[str, str]]) -> None:
    for job in jobs.values():
        controller = psutil.Process(int(job["number"]))
        for process in (controller, *controller.children(recursive=True)):
            process.kill()
            process.wait(30)


def wait_for(holds: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.3)
