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
from transformers import PreTrainedTokenizerFast

from dtfcli.evaluation.answers import AnsweredBatch, AnswerStore
from tests.conftest import Outcome
from tests.evaluation.conftest import ITEMS
from tests.tiny import routed_model

TASKS = "toy_choice,toy_text,toy_writing"


@pytest.fixture
def model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder."""
    folder = tmp_path / "model"
    routed_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


def _answered(folder: Path) -> int:
    """Requests whose answers are on disk."""
    files = list((folder / "eval" / "unfinished").glob("*.jsonl"))
    return sum(len(store._known) for file in files for store in [AnswerStore(file)])


@pytest.mark.slow
def test_killed_twice_and_started_again(
    model: Path, command: Callable[..., list[str]], dtf: Callable[..., Outcome]
) -> None:
    dtf(*command(model))
    undisturbed = _scores(model)
    first = json.loads((model / "eval" / "latest.json").read_text())
    assert first["reused"] == 0
    assert not (model / "eval" / "unfinished").exists()
    for file in (model / "eval").iterdir():
        file.unlink()

    # Every batch waits a little, so that there is time to kill it.
    slow = (
        "import sys, time\n"
        "from dtfcli.evaluation.lm import RoutedLM\n"
        "from dtfcli.cli.app import main\n"
        "add = RoutedLM._answered\n"
        "RoutedLM._answered = lambda *a, **k: (time.sleep(0.05), add(*a, **k))[1]\n"
        "sys.argv = ['dtf', *sys.argv[1:]]\n"
        "main()\n"
    )
    seen = 0
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", slow, *command(model)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        deadline = time.monotonic() + 120
        while _answered(model) < seen + 8 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert child.poll() is None, "it ended before it could be killed"
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (model / "eval" / "latest.json").exists()
        assert _answered(model) > seen
        seen = _answered(model)

    result = dtf(*command(model))
    assert result.code == 0, result.stderr
    assert _scores(model) == undisturbed
    document = json.loads((model / "eval" / "latest.json").read_text())
    assert document["reused"] >= seen
    assert not (model / "eval" / "unfinished").exists()


@pytest.mark.slow
def test_another_capacity_or_limit_reuses_nothing(
    model: Path, command: Callable[..., list[str]], dtf: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtfcli.evaluation.job_runner import EvalEvent

    class Stop(Exception):
        pass

    from dtfcli.cli.eval_view import EvalProgress

    show = EvalProgress.__call__

    def stop_at_writing(self: Any, event: EvalEvent) -> None:
        show(self, event)
        if event.kind == "job" and event.message == "toy_writing":
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(EvalProgress, "__call__", stop_at_writing)
        assert dtf(*command(model)).code == 1
    kept = {file.name for file in (model / "eval" / "unfinished").iterdir()}
    assert len(kept) == 2
    shots = ["--num-fewshot", "1", "--tasks", "toy_choice"]
    for more in (["--capacity", "0.25"], ["--limit", "5"], shots, ["--routing", "threshold"]):
        assert dtf(*command(model, *more)).code == 0
        document = json.loads((model / "eval" / "latest.json").read_text())
        if more[0] != "--routing":  # which is the model's own mode
            assert document["reused"] == 0
            assert {file.name for file in (model / "eval" / "unfinished").iterdir()} == kept
    assert document["reused"] == ITEMS * 4 + ITEMS
    assert not (model / "eval" / "unfinished").exists()


def test_half_a_line_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    store = AnswerStore(path)
    batches = [AnsweredBatch([[-1.5 / 3, True]], {}, 0, 0.1), AnsweredBatch([[-2.0, False]], {}, 1, 0.2)]
    keys = [store.key(content) for content in ("a", "b")]
    for key, batch in zip(keys, batches, strict=True):
        store.add(key, batch)
    store.close()
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        again = AnswerStore(path)
        found = [again.find(key) for key in keys]
        assert all(batch in (None, expected) for batch, expected in zip(found, batches, strict=True))
        for key, batch, known in zip(keys, batches, found, strict=True):
            if known is None:
                again.add(key, batch)
        again.close()
        assert [AnswerStore(path).find(key) for key in keys] == batches


def test_repeats_are_answered_each(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.jsonl")
    assert store.key("same") != store.key("same")
