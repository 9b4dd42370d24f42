"""Runs on text that streams: resumed at any step they train on the same rows, and a lost source loses nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtfcli.data.documents import Document
from dtfcli.data.hub import SourceLost
from dtfcli.data.tokenizer import train_tokenizer
from dtfcli.errors import DataError
from dtfcli.evaluation.runner import evaluate
from dtfcli.experiment import train
from dtfcli.loading.load import load_tokenizer
from dtfcli.runs.folder import list_checkpoints
from dtfcli.settings import Settings
from dtfcli.training.checkpoint import read_state
from dtfcli.training.loop import TrainingInterrupted, TrainResult
from dtfcli.training.rows import StreamedRows
from tests.training.small_runs import Killed, assert_same, kill_at, resume, small_settings, the_run, write_text


def streaming_settings(folder: Path, architecture: str = "dtf", **data: Any) -> Settings:
    """A small run over two sources that stream."""
    text = write_text(folder)
    (folder / "second.jsonl").write_text("\n".join(reversed(text.read_text().splitlines()[:20])))
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    if not (folder / "tokenizer").exists():
        train_tokenizer((Document(text) for text in texts), 300).save_pretrained(folder / "tokenizer")
    sources = [
        {"path": str(folder / "text.jsonl"), "streaming": True, "weight": 3.0},
        {"path": str(folder / "second.jsonl"), "streaming": True, "weight": 1.0},
    ]
    values = {"sources": sources, "tokenizer": str(folder / "tokenizer"), "shuffle_buffer": 8}
    return small_settings(folder, architecture, data=values | {"validation_fraction": 0.2} | data)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    """The rows of each step, with its number."""
    rows: list[tuple[int, bytes]] = []
    take = StreamedRows.take

    def noted(self: StreamedRows, step: int, check: Callable[[], None]) -> np.ndarray:
        rows.append((step, (taken := take(self, step, check)).tobytes()))
        return taken

    monkeypatch.setattr(StreamedRows, "take", noted)
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(streaming_settings(tmp_path_factory.mktemp("undisturbed")))


def test_killed_and_resumed(tmp_path: Path, undisturbed: TrainResult, taken: list[tuple[int, bytes]]) -> None:
    with pytest.raises(Killed):
        train(streaming_settings(tmp_path), on_event=kill_at("step", 5))
    before = dict(taken)
    assert_same(resume(the_run(tmp_path)).run_dir, undisturbed.run_dir)
    again = taken[len(before) :]
    assert [number for number, _ in again] == [4, 5]  # a checkpoint every two steps
    assert all(before[number] == rows for number, rows in again if number in before)
    assert len({rows for _, rows in taken}) == 6


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_source_and_ctrl_c_while_text_is_awaited(
    tmp_path: Path, undisturbed: TrainResult, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Both leave a checkpoint of the step, from which the run goes on."""
    take = StreamedRows.take

    def disturbed(self: StreamedRows, step: int, check: Any) -> np.ndarray:
        if step == 3 and lost:
            raise SourceLost("data.sources[0].path = 'o/n': the Hub cannot be reached any more.")
        if step == 3:
            check.__self__.requested = True  # as the signal's handler does
            check()
        return take(self, step, check)

    message = r"'o/n'.*step 3 is saved as .*step-000003.*--resume" if lost else r"step 3 of 6, saved"
    with monkeypatch.context() as patched:
        patched.setattr(StreamedRows, "take", disturbed)
        with pytest.raises(SourceLost if lost else TrainingInterrupted, match=message) as raised:
            train(streaming_settings(tmp_path))
    assert raised.value.exit_code == (1 if lost else 130)
    assert "\n" not in str(raised.value)
    assert read_state(list_checkpoints(the_run(tmp_path))[0]).step == 3
    if lost:  # the same checkpoint
        assert_same(resume(the_run(tmp_path)).run_dir, undisturbed.run_dir)


def test_changed_sources_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(streaming_settings(tmp_path, "dense"), on_event=kill_at("step", 3))
    with (tmp_path / "second.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    with pytest.raises(DataError, match=r"data\.sources have changed"):
        resume(the_run(tmp_path))


def test_without_validation_text(tmp_path: Path) -> None:
    result = train(streaming_settings(tmp_path, "mod", validation_fraction=0.0))
    assert (result.metrics, result.steps) == ({}, 6)


@pytest.mark.slow
def test_on_conversations(tmp_path: Path) -> None:
    """The answers are learned, the questions are not; packed before and streamed alike."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    streaming_settings(tmp_path)  # writes text and tokenizer
    rows = []
    for line in (tmp_path / "text.jsonl").read_text().splitlines():
        words = json.loads(line)["text"].split()
        turns = [{"role": "user", "content": " ".join(words[:20])}, {"role": "assistant", "content": "cat cat cat cat"}]
        rows.append(json.dumps({"chat": turns}))
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for streams in (True, False):
        source = {"path": str(tmp_path / "chat.jsonl"), "messages_field": "chat", "streaming": streams}
        data = {"sources": [source], "tokenizer": str(tmp_path / "tokenizer"), "validation_fraction": 0.2}
        training = {"max_steps": 40, "eval_every": 40, "checkpoint_every": 40}
        run = {"name": f"chat-{streams}"}
        result = train(small_settings(tmp_path, "mod", data=data, training=training, run=run))
        # A few tokens of one answer: far below what the questions' random words would allow.
        assert result.metrics["val/loss"] < 0.8, streams
        assert 0 < result.metrics["val/unigram"] < 2.5
    score = evaluate(result.run_dir, tasks=["validation_text"]).results["validation_text"]
    assert score.metrics["loss"].value == pytest.approx(result.metrics["val/loss"], abs=1e-3)
