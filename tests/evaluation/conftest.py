"""A small benchmark in every form that lm-eval knows, in the layout of `--data-dir`, and task files for it."""

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests import tiny

WORDS = [f"w{i}" for i in range(26, 90)]
ITEMS = 24

README = """---
configs:
- config_name: default
  data_files:
{splits}
---
"""
CHOICE = """task: {name}
dataset_path: {dataset}
output_type: multiple_choice
training_split: {train}
validation_split: validation
test_split: null
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
WRITING = """task: toy_writing
dataset_path: toy/quiz
output_type: generate_until
training_split: train
test_split: validation
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs:
  until: ["w30"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
TEXT = """task: toy_text
dataset_path: toy/quiz
output_type: loglikelihood_rolling
test_split: validation
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
metadata:
  version: 1.0
"""
GROUP = """group: toy_group
task:
  - toy_choice
  - toy_other
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1
"""


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
    lines = "\n".join(f"  - split: {split}\n    path: {split}.jsonl" for split in splits)
    (folder / "README.md").write_text(README.format(splits=lines))


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
    for name, dataset in (("toy_choice", "toy/quiz"), ("toy_other", "toy/quiz"), ("toy_half", "toy/half")):
        (root / f"{name}.yaml").write_text(CHOICE.format(name=name, dataset=dataset, train="train"))
    for name, text in (("toy_writing", WRITING), ("toy_text", TEXT), ("toy_group", GROUP)):
        (root / f"{name}.yaml").write_text(text)
    return root


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer, with an end-of-text token."""
    tokenizer = tiny.word_tokenizer()
    tokenizer.eos_token = "z"
    return tokenizer
