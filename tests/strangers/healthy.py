"""Healthy files of every kind that is read, small ones: what `damage` starts from."""

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import pyarrow
import pyarrow.parquet
import torch
import torch.distributed.checkpoint

from dtfcli.evaluation.report import EvalReport, Metric, TaskScore, write_document
from dtfcli.loading.adapters import adapt, adapter_state, save_adapter
from dtfcli.loading.model_files import weights_hash
from dtfcli.settings.schema import load_settings
from dtfcli.training.checkpoint import save_checkpoint
from dtfcli.training.run import TrainingState
from tests.tiny import dense_model, routed_model, word_tokenizer

TASK = """\
task: strangers_task
dataset_path: somebody/words
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


class _Alone:
    """The processes of a run: this one."""

    is_main = True

    def barrier(self) -> None:
        """For nobody."""


class _States:
    """What a checkpoint saves: two files."""

    def save(self, folder: Path) -> None:
        """Write them."""
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "rest").mkdir()
        (folder / "rest" / "optimizer.bin").write_bytes(b"moments")


def write_models(root: Path) -> None:
    """Folders `dense`, `routed`, `sharded` and `adapter` (of `dense`), with tokenizers."""
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.eos_token = "z"
    dense_model().save_pretrained(root / "dense")
    routed_model().save_pretrained(root / "routed")
    routed_model().save_pretrained(root / "sharded", max_shard_size="40KB")
    for name in ("dense", "routed", "sharded"):
        tokenizer.save_pretrained(root / name)
    settings = load_settings(None, [f"model.base={root / 'dense'}", "lora.enabled=true", "lora.r=2", "model=mod"])
    adapted: Any = adapt(routed_model(architecture="mod"), settings)
    (root / "adapter").mkdir()
    save_adapter(adapted, root / "adapter", adapter_state(adapted))
    tokenizer.save_pretrained(root / "adapter")


def write_gguf(path: Path) -> None:
    """A dense Llama with a byte-pair tokenizer, as llama.cpp stores one."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    words = [chr(ord("a") + i) for i in range(26)] + ["ab", "<|endoftext|>"]
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * 27 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(27)
    writer.add_eos_token_id(27)
    torch.manual_seed(0)
    shapes = {"token_embd": (28, 32), "output_norm": (32,), "output": (28, 32)}
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {f"{block}attn_norm": (32,), f"{block}ffn_norm": (32,)}
        shapes |= {f"{block}attn_q": (32, 32), f"{block}attn_output": (32, 32)}
        shapes |= {f"{block}attn_k": (16, 32), f"{block}attn_v": (16, 32)}
        shapes |= {f"{block}ffn_gate": (48, 32), f"{block}ffn_up": (48, 32), f"{block}ffn_down": (32, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(*shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_run(run: Path, model: Path) -> None:
    """A run folder with settings, metrics, two checkpoints, a final model and its evaluation."""
    import shutil

    settings = load_settings("quickstart")
    (run / "eval").mkdir(parents=True)
    (run / "settings.toml").write_text(settings.to_toml())
    lines = [{"step": step, "train/loss": 5.0 / step, "val/loss": 6.0 / step, "val/unigram": 7.0} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (2, 3):
        save_checkpoint(_States(), run, TrainingState(step=step, metrics_bytes=10), 2, _Alone())
    shutil.copytree(model, run / "final_model")
    score = TaskScore(metrics={"acc": Metric(0.5, 0.1, True)}, n=10, shots=0, dataset="somebody/words", routing="topk")
    report = EvalReport(
        model="m", model_hash=f"sha256:{weights_hash(model)}", architecture="dtf", routing="threshold", capacity=0.5,
        tasks=("words",), results={"words": score}, versions={"python": "3.11"}, started="2026-01-01T00:00:00",
    )  # fmt: skip
    write_document(report.to_dict(), run / "eval" / "latest.json")


def write_data(folder: Path) -> None:
    """Text, rows and a table, and a benchmark with its task file."""
    folder.mkdir(parents=True)
    texts = [f"a b c w{i} " * 20 for i in range(26, 36)]
    (folder / "text.txt").write_text("\n".join(texts))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(10))}), folder / "table.parquet")
    words = folder / "data" / "somebody" / "words"
    words.mkdir(parents=True)
    (words / "test.jsonl").write_text("".join(json.dumps({"question": text[:9]}) + "\n" for text in texts))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "task.yaml").write_text(TASK)


def write_all(root: Path) -> None:
    """Everything, under `models`, `gguf`, `run`, `texts`."""
    (root / "models").mkdir(parents=True)
    write_models(root / "models")
    (root / "gguf").mkdir()
    write_gguf(root / "gguf" / "small.gguf")
    write_run(root / "run", root / "models" / "routed")
    write_data(root / "texts")
