"""Killed at any moment and started again: the same scores, to the last bit, and nothing is answered twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtfcli.evaluation.answers import AnsweredBatch, AnswerStore
from tests.conftest import Outcome
from tests.evaluation.conftest import ITEMS

TASKS = "toy_choice,toy_text,toy_writing"


@pytest.fixture
def command(data_dir: Path, task_dir: Path) -> Callable[..., list[str]]:
    """`dtf eval` of the toy tasks, two rows at a time."""

    def words(model: Path, *more: str) -> list[str]:
        options = ["--tasks", TASKS, "--batch-size", "2", "--data-dir", str(data_dir), "--include-path", str(task_dir)]
        return ["eval", str(model), *options, "--device", "cpu", *more]

    return words


def _scores(folder: Path) -> dict[str, Any]:
    """What must not depend on the way: everything but times and what was reused."""
    document = json.loads((folder / "eval" / "latest.json").read_text())
    for result in document["results"].values():
        result.pop("seconds")
    return {"results": document["results"], "routed_share": document["routed_share"]}


def _batches(folder: Path) -> int:
    """Answered batches on disk."""
    return sum(file.read_bytes().count(b"\n{") for file in (folder / "eval" / "unfinished").glob("*.jsonl"))


# Every batch takes a while, so that there is time to kill it.
SLOW = """
import time
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.cli.app import main
answered = RoutedLM._answered
RoutedLM._answered = lambda *a, **k: (time.sleep(0.05), answered(*a, **k))[1]
main()
"""


@pytest.mark.slow
def test_killed_and_started_again(model: Path, command: Callable[..., list[str]], dtf: Callable[..., Outcome]) -> None:
    """And what was answered under other circumstances is not reused."""
    dtf(*command(model))
    undisturbed = _scores(model)
    assert not (model / "eval" / "unfinished").exists()
    (model / "eval" / "latest.json").unlink()
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command(model)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 120
    while _batches(model) < ITEMS and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.poll() is None, "it ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (model / "eval" / "latest.json").exists()
    kept = {file.name for file in (model / "eval" / "unfinished").iterdir()}

    for more in (["--capacity", "0.25"], ["--limit", "5"], ["--num-fewshot", "1", "--tasks", "toy_choice"]):
        assert dtf(*command(model, *more)).code == 0
        assert json.loads((model / "eval" / "latest.json").read_text())["reused"] == 0
        assert {file.name for file in (model / "eval" / "unfinished").iterdir()} == kept
    assert dtf(*command(model, "--routing", "threshold")).code == 0  # which is the model's own mode
    assert _scores(model) == undisturbed
    assert json.loads((model / "eval" / "latest.json").read_text())["reused"] >= ITEMS
    assert not (model / "eval" / "unfinished").exists()


def test_half_a_line_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    store = AnswerStore(path)
    assert store.key("same") != store.key("same"), "repeats are answered each"
    batches = [AnsweredBatch([[-1.5 / 3, True]], {}, 0, 0.1), AnsweredBatch([[-2.0, False]], {}, 1, 0.2)]
    keys = [store.key(content) for content in ("a", "b")]
    for key, batch in zip(keys, batches, strict=True):
        store.add(key, batch)
    store.close()
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        again = AnswerStore(path)
        known = [again.find(key) for key in keys]
        assert all(batch in (None, expected) for batch, expected in zip(known, batches, strict=True))
        for key, batch, stored in zip(keys, batches, known, strict=True):
            if stored is None:
                again.add(key, batch)
        again.close()
        assert [AnswerStore(path).find(key) for key in keys] == batches
