"""Runs of a few seconds: a small text, a small tokenizer, a small model."""

import json
import random
from pathlib import Path
from typing import Any

from dtfcli.settings import Settings
from dtfcli.settings.sources import merge

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sun",
    "moon",
    "river",
    "stone",
    "walks",
    "sleeps",
    "shines",
    "falls",
    "over",
    "near",
]


def write_text(folder: Path, documents: int = 60) -> Path:
    """A .jsonl file of sentences made of few words."""
    rng = random.Random(0)
    path = folder / "text.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=80)) + "."}) for _ in range(documents)]
    path.write_text("\n".join(lines))
    return path


def small_settings(folder: Path, architecture: str = "dtf", **groups: dict[str, Any]) -> Settings:
    """Settings of a run in `folder`: 4 layers of width 32, 6 updates of 4 rows; `groups` are laid over them."""
    values: dict[str, Any] = {
        "run": {"name": "small", "output_dir": str(folder / "outputs"), "dtype": "float32", "device": "cpu"},
        "model": {
            "architecture": architecture,
            "scratch": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 300,
                "max_position_embeddings": 64,
            },
        },
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
    if not (folder / "text.jsonl").exists():
        write_text(folder)
    return Settings.model_validate(merge(values, groups))
