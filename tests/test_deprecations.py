"""Nothing that we call is on its way out: no library says "deprecated" in a run from training to a benchmark.

`warnings` that libraries address to our files are errors in every test (pyproject.toml). Transformers says much through
its logger instead, once a process, and we silence that logger while we work; here it speaks.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

import dtfcli
from dtfcli import quiet
from dtfcli.generation import Sampling
from tests.evaluation.conftest import TASKS, write_dataset
from tests.training.small_runs import small_settings

LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "lm_eval", "peft", "transformers")


class _Listener(logging.Handler):
    """Keeps what is said at level WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")

    def deprecations(self) -> list[str]:
        return [line for line in self.lines if "deprecat" in line.lower()]


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Listener]:
    """What the libraries log, though we keep them quiet, and though they may have said it before."""
    monkeypatch.setattr(quiet, "_LOGGERS", ())
    transformers_logging.warning_once.cache_clear()
    heard = _Listener()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(heard)
        monkeypatch.setattr(logger, "level", logging.WARNING)
        logger.manager._clear_cache()  # what setLevel does after it set the level
    yield heard
    for logger in loggers:
        logger.removeHandler(heard)


def test_the_listener_hears_transformers(listener: _Listener) -> None:
    with quiet.quiet_libraries():
        transformers_logging.get_logger("transformers.models").warning_once("`x` is deprecated")
    assert listener.deprecations() == ["transformers.models: `x` is deprecated"]


def test_nothing_we_call_is_deprecated(tmp_path: Path, listener: _Listener) -> None:
    torch.set_num_threads(1)
    training = {"max_steps": 2, "eval_every": 2, "gradient_checkpointing": True}
    settings = small_settings(tmp_path, model={"scratch": {"max_position_embeddings": 512}}, training=training)
    folder = dtfcli.train(settings).final_model_path
    model, tokenizer = dtfcli.load_model(folder), dtfcli.load_tokenizer(folder)
    assert dtfcli.generate(model, tokenizer, "the cat", Sampling(max_new_tokens=4)).text
    write_dataset(tmp_path / "data" / "toy" / "quiz", {"train": 4, "validation": 4})
    (tmp_path / "toy_choice.yaml").write_text(json.dumps(TASKS[0]))
    report = dtfcli.evaluate(
        model, "toy_choice", tokenizer=tokenizer, data_dir=tmp_path / "data", include_path=tmp_path, limit=2
    )
    assert report.results["toy_choice"].n == 2
    model.save_pretrained(tmp_path / "again")
    assert listener.deprecations() == []
