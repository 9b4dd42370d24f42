"""A small benchmark in every form that lm-eval knows, in the layout of `--data-dir`, and task files for it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests import tiny

WORDS = [f"w{i}" for i in range(26, 90)]
ITEMS = 24


def _task(name: str, output_type: str, *metrics: str, **fields: Any) -> dict[str, Any]:
    means = {} if "perplexity" in metrics[0] else {"aggregation": "mean", "higher_is_better": True}
    return {
        "task": name,
        "dataset_path": "toy/quiz",
        "output_type": output_type,
        "test_split": "validation",
        "doc_to_text": "{{question}}",
        "metric_list": [{"metric": metric, **means} for metric in metrics],
        "metadata": {"version": 1.0},
        **fields,
    }


CHOICE = {
    "training_split": "train",
    "validation_split": "validation",
    "test_split": None,
    "doc_to_target": "{{label}}",
    "doc_to_choice": "choices",
}
TASKS = [
    _task("toy_choice", "multiple_choice", "acc", "acc_norm", **CHOICE),
    _task("toy_other", "multiple_choice", "acc", "acc_norm", **CHOICE),
    _task("toy_half", "multiple_choice", "acc", "acc_norm", **CHOICE, dataset_path="toy/half"),
    _task(
        "toy_writing",
        "generate_until",
        "exact_match",
        training_split="train",
        doc_to_target="{{choices[label]}}",
        generation_kwargs={"until": ["w30"], "max_gen_toks": 8, "do_sample": False},
    ),
    _task(
        "toy_text",
        "loglikelihood_rolling",
        "word_perplexity",
        "bits_per_byte",
        doc_to_text="",
        doc_to_target="{{question}}",
    ),
    {
        "group": "toy_group",
        "task": ["toy_choice", "toy_other"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1},
    },
]


def write_dataset(folder: Path, splits: dict[str, int], seed: int = 0) -> None:
    """Questions of 3 to 40 words with four answers of 1 to 3 words, as .jsonl with a card."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        rows = [
            {
                "question": " ".join(rng.choices(WORDS, k=rng.randint(3, 40))),
                "choices": [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(4)],
                "label": rng.randrange(4),
            }
            for _ in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = {"configs": [{"config_name": "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy/quiz` with both of its splits, `toy/half` that lacks the training one."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "toy" / "quiz", {"train": 30, "validation": ITEMS})
    write_dataset(root / "toy" / "half", {"validation": ITEMS}, seed=1)
    return root


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files: choices, writing, perplexity, and a group."""
    root = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        (root / f"{task.get('task') if 'group' not in task else task['group']}.yaml").write_text(json.dumps(task))
    return root


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer, with an end-of-text token."""
    tokenizer = tiny.word_tokenizer()
    tokenizer.eos_token = "z"
    return tokenizer


@pytest.fixture
def model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a routed model."""
    folder = tmp_path / "model"
    tiny.routed_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
