"""Runs of a few seconds: a small text, a small tokenizer, a small model. Ways to kill them, and to compare them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtfcli.experiment import train
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import run_settings
from dtfcli.settings import Settings
from dtfcli.settings.sources import merge
from dtfcli.training.events import TrainEvent
from dtfcli.training.loop import TrainResult

NOUNS = ["cat", "dog", "sun", "moon", "river", "stone"]
WORDS = ["the", "a", *NOUNS, "walks", "sleeps", "shines", "falls", "over", "near"]
TIMED = ("tokens_per_second", "mfu")


def write_text(folder: Path, documents: int = 60) -> Path:
    """A .jsonl file of sentences made of few words."""
    rng = random.Random(0)
    path = folder / "text.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=80)) + "."}) for _ in range(documents)]
    path.write_text("\n".join(lines))
    return path


def small_settings(folder: Path, architecture: str = "dtf", **groups: dict[str, Any]) -> Settings:
    """Settings of a run in `folder`: 4 layers of width 32, 6 steps of 4 rows; `groups` are laid over them."""
    scratch = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    scratch |= {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64}
    values: dict[str, Any] = {
        "run": {"name": "small", "output_dir": str(folder / "outputs"), "dtype": "float32", "device": "cpu"},
        "model": {"architecture": architecture, "scratch": scratch},
        "data": {
            "sources": [{"path": str(folder / "text.jsonl")}],
            "seq_len": 32,
            "validation_fraction": 0.1,
            "validation_blocks": 4,
            "cache_dir": str(folder / "cache"),
        },
        "training": {
            "max_steps": 6,
            "micro_batch_size": 2,
            "tokens_per_update": 128,
            "learning_rates": {"base": 1e-2, "prior": 1e-2, "router": 1e-2},
            "warmup_ratio": 0.2,
            "log_every": 2,
            "eval_every": 3,
            "checkpoint_every": 2,
        },
    }
    if architecture != "dense":
        values["training"]["calibration_tokens"] = 256
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.jsonl").exists():
        write_text(folder)
    return Settings.model_validate(merge(values, groups))


class Killed(BaseException):
    """An error that no handler in the loop catches."""


def kill_at(kind: str, step: int) -> Callable[[TrainEvent], None]:
    """A listener that kills the run at the first event of a kind and step."""

    def listener(event: TrainEvent) -> None:
        if (event.kind, event.step) == (kind, step):
            raise Killed

    return listener


def the_run(folder: Path) -> Path:
    """The only run in a folder."""
    (run,) = (folder / "outputs").glob("*/small")
    return run


def resume(run: Path, on_event: Callable[[TrainEvent], None] | None = None) -> TrainResult:
    """Go on with a run as `dtf train --resume` does."""
    return train(run_settings(run), resume=run, on_event=on_event)


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(run / "metrics.jsonl")]


def assert_same(run: Path, undisturbed: Path) -> None:
    """The models and metrics of two runs are the same, bit for bit."""
    for name in ("final_model", "best_model"):
        weights = (folder / name / "model.safetensors" for folder in (run, undisturbed))
        assert next(weights).read_bytes() == next(weights).read_bytes()
    assert lines_of(run) == lines_of(undisturbed)
