"""Runs on text that streams: resumed at any step they train on the same rows, and a lost source loses nothing."""

from __future__ import annotations

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
from dtfcli.runs.folder import list_checkpoints, run_settings
from dtfcli.settings import Settings
from dtfcli.training import loop
from dtfcli.training.checkpoint import read_state
from dtfcli.training.loop import TrainResult
from dtfcli.training.rows import StreamedRows
from tests.training.small_runs import small_settings, write_text
from tests.training.test_resume import Killed, assert_same, kill_when, the_run

Rows = list[tuple[int, bytes]]


def streaming_settings(folder: Path, architecture: str = "dtf", **groups: dict[str, Any]) -> Settings:
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
    data = {"sources": sources, "tokenizer": str(folder / "tokenizer"), "shuffle_buffer": 8, "validation_fraction": 0.2}
    return small_settings(folder, architecture, **{"data": data, **groups})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The rows of each update, with its step."""
    rows: Rows = []
    take = StreamedRows.take

    def noted(self: StreamedRows, step: int, check: Callable[[], None]) -> np.ndarray:
        found = take(self, step, check)
        rows.append((step, found.tobytes()))
        return found

    monkeypatch.setattr(StreamedRows, "take", noted)
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(streaming_settings(tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_and_resumed(tmp_path: Path, undisturbed: TrainResult, taken: Rows, step: int) -> None:
    settings = streaming_settings(tmp_path)
    with pytest.raises(Killed):
        train(settings, on_event=kill_when(lambda event: (event.kind, event.step) == ("step", step)))
    before = dict(taken)
    resumed = train(run_settings(the_run(tmp_path)), resume=the_run(tmp_path))
    assert_same(resumed, undisturbed)
    again = taken[len(before) :]
    assert [number for number, _ in again] == list(range(2 * (step // 2), 6))  # a checkpoint every two steps
    assert all(before[number] == rows for number, rows in again if number in before)
    assert len({rows for _, rows in taken}) == 6


def test_a_lost_source_leaves_a_checkpoint(tmp_path: Path, undisturbed: TrainResult, monkeypatch: Any) -> None:
    settings = streaming_settings(tmp_path)
    update = loop.train_step

    def unlucky(run: Any) -> dict[str, Any]:
        if run.state.step == 3:
            raise SourceLost("data.sources[0].path = 'o/n': the Hub cannot be reached any more.")
        return update(run)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", unlucky)
        with pytest.raises(SourceLost, match=r"'o/n'.*step 3 is saved as .*step-000003.*--resume") as raised:
            train(settings)
    assert raised.value.exit_code == 1
    assert "\n" not in str(raised.value)
    assert read_state(list_checkpoints(the_run(tmp_path))[0]).step == 3
    assert_same(train(run_settings(the_run(tmp_path)), resume=the_run(tmp_path)), undisturbed)


@pytest.mark.slow
def test_interrupted_while_waiting_for_text(tmp_path: Path, undisturbed: TrainResult, monkeypatch: Any) -> None:
    take = StreamedRows.take

    def waiting(self: StreamedRows, step: int, check: Callable[[], None]) -> np.ndarray:
        if step == 3:
            run_stop.append(step)
            check.__self__.requested = True  # what the signal's handler does
            check()
        return take(self, step, check)

    run_stop: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(StreamedRows, "take", waiting)
        with pytest.raises(loop.TrainingInterrupted, match=r"step 3 of 6, saved"):
            train(streaming_settings(tmp_path))
    assert run_stop == [3]
    assert_same(train(run_settings(the_run(tmp_path)), resume=the_run(tmp_path)), undisturbed)


def test_changed_sources_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(
            streaming_settings(tmp_path, "dense"),
            on_event=kill_when(lambda event: (event.kind, event.step) == ("step", 3)),
        )
    with (tmp_path / "second.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    with pytest.raises(DataError, match=r"data\.sources have changed"):
        train(run_settings(the_run(tmp_path)), resume=the_run(tmp_path))


@pytest.mark.parametrize("architecture", ["mod", "dense"])
def test_other_architectures_and_no_validation(tmp_path: Path, architecture: str) -> None:
    settings = streaming_settings(tmp_path, architecture)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"validation_fraction": 0.0})})
    result = train(settings)
    assert result.metrics == {}
    assert result.steps == 6


@pytest.mark.slow
def test_on_conversations(tmp_path: Path) -> None:
    """The answers are learned, the questions are not; packed before and streamed alike."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    settings = streaming_settings(tmp_path)
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
        report = evaluate(result.run_dir, tasks=["validation_text"])
        measured = report.results["validation_text"].metrics["loss"].value
        assert measured == pytest.approx(result.metrics["val/loss"], abs=1e-3)
    assert settings.data.streaming
