"""Healthy files of every kind that is read, small ones, made once: `damage` starts from them; the Hub's stand-in."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pyarrow
import pyarrow.parquet
import pytest
import torch

from dtfcli.experiment import train
from dtfcli.loading.adapters import adapt, adapter_state, save_adapter
from dtfcli.settings.schema import load_settings
from tests.hub.conftest import hub, server, waits  # noqa: F401  # fixtures
from tests.tiny import dense_model, routed_model, word_tokenizer
from tests.training.small_runs import small_settings

TASK = """\
task: strangers_task
dataset_path: somebody/words
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def write_models(root: Path) -> None:
    """Folders `dense`, `routed`, `sharded` and `adapter` (of `dense`), with tokenizers."""
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.eos_token = "z"
    dense_model().save_pretrained(root / "dense")
    routed_model().save_pretrained(root / "routed")
    routed_model().save_pretrained(root / "sharded", max_shard_size="40KB")
    settings = load_settings(None, [f"model.base={root / 'dense'}", "lora.enabled=true", "lora.r=2", "model=mod"])
    adapted: Any = adapt(routed_model(architecture="mod"), settings)
    (root / "adapter").mkdir()
    save_adapter(adapted, root / "adapter", adapter_state(adapted))
    for name in ("dense", "routed", "sharded", "adapter"):
        tokenizer.save_pretrained(root / name)


def write_gguf(path: Path) -> None:
    """A dense Llama with a byte-pair tokenizer, as llama.cpp stores one."""
    path.parent.mkdir()
    writer = gguf.GGUFWriter(str(path), "llama")
    words = [chr(ord("a") + i) for i in range(26)] + ["ab", "<|endoftext|>"]
    values: dict[str, Any] = {"block_count": 2, "context_length": 64, "embedding_length": 32, "vocab_size": len(words)}
    values |= {"feed_forward_length": 48, "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5}
    values |= {"rope_freq_base": 10000.0, "tokenizer_model": "gpt2", "token_list": words, "token_merges": ["a b"]}
    values |= {"token_types": [1] * 27 + [3], "bos_token_id": 27, "eos_token_id": 27}
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (28, 32), "output_norm": (32,), "output": (28, 32)}
    block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    block |= {"attn_output": (32, 32), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in block.items()}
    torch.manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(*shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_run(folder: Path) -> None:
    """A run folder with settings, metrics, two checkpoints, a final model and its evaluation."""
    folder.mkdir()
    evaluation = {"after": "validation_text"}
    result = train(small_settings(folder, training={"max_steps": 4, "eval_every": 4}, eval=evaluation))
    result.run_dir.rename(folder / "run")
    shutil.rmtree(folder / "run" / "best_model")


def write_data(folder: Path) -> None:
    """Text, rows and a table, and a benchmark with its task file."""
    words = folder / "data" / "somebody" / "words"
    words.mkdir(parents=True)
    texts = [f"a b c w{i} " * 20 for i in range(26, 36)]
    (folder / "text.txt").write_text("\n".join(texts))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(10))}), folder / "table.parquet")
    (words / "test.jsonl").write_text("".join(json.dumps({"question": text[:9]}) + "\n" for text in texts))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "task.yaml").write_text(TASK)


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `models`, `gguf`, `small/run` and `texts`; do not change them."""
    root = tmp_path_factory.mktemp("healthy")
    write_models(root / "models")
    write_gguf(root / "gguf" / "small.gguf")
    write_run(root / "small")
    write_data(root / "texts")
    return root
