"""The GPU script: its rehearsal measures something of each kind, its commands are valid, and it keeps to its time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtfcli.settings import load_settings
from tools import gpu


@pytest.mark.slow
def test_the_rehearsal_measures_something_of_each_kind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu", "--rehearse", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "results.json").read_text("utf-8")
    _, tests, bench, static, train = (entry["values"] for entry in json.loads((tmp_path / "results.json").read_text()))
    assert tests["passed"] > 3
    assert [row["architecture"] for row in bench["training"]] == ["dense", "dtf", "dtf", "mod", "mod"]
    assert {row["phase"] for row in bench["results"]} == {"prefill", "decode"}
    assert static["static"]
    assert all(row["theory"] > 0 and row["time_ratio"] > 0 for row in bench["results"] + static["results"])
    assert train["steps"] == 3
    assert train["tokens_per_second"] > 0
    assert 0 < train["mfu"] < 1
    table = (tmp_path / "table.md").read_text("utf-8")
    assert f"{tests['passed']} passed, 0 failed" in table
    assert "| bench toy, train,prefill,decode, 2 × 64 | dtf | 0.125 |" in table
    assert "| train toy dtf | 3 |" in table


def test_every_command_has_settings_that_something_reads(tmp_path: Path) -> None:
    for stage in (*gpu.stages(tmp_path), *gpu.rehearsal(tmp_path)):
        if stage.arguments[2] in ("bench", "train"):
            load_settings(stage.arguments[3], [item for item in stage.arguments[4:] if "=" in item])


def test_a_stage_that_fails_hangs_or_has_no_time_costs_the_others_nothing(tmp_path: Path) -> None:
    def stage(name: str, limit: float, code: str) -> gpu.Stage:
        return gpu.Stage(name, limit, ("-c", code), lambda output, _: json.loads(output))

    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    chosen = [
        stage("fails", 60, "raise SystemExit('out of luck')"),
        stage("hangs", 1, child),
        stage("long", 1000, ""),
        stage("works", 60, "print('{}')"),
    ]
    began = time.monotonic()
    entries = gpu.run_all(chosen, tmp_path, tmp_path, 2.0)
    assert time.monotonic() - began < 50
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == json.loads(json.dumps(entries))
    outcomes = {entry["name"]: entry.get("error", "complete") for entry in entries}
    assert outcomes["fails"] == "exit status 1"
    assert entries[0]["said"] == ["out of luck"]
    assert outcomes["hangs"] == "ended after 1 s"
    assert outcomes["long"].startswith("left out: 1")
    assert outcomes["works"] == "complete"
    assert f"| works | {entries[3]['seconds']:.4g} | complete |" in (tmp_path / "table.md").read_text("utf-8")
