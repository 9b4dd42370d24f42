"""Everything that reads files: what each reads, the file that a case damages, and what must hold of its answer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dtfcli.data.documents import open_sources
from dtfcli.errors import ConfigError
from dtfcli.evaluation.harness import load_job
from dtfcli.evaluation.report import EvalReport
from dtfcli.evaluation.suites import TaskIndex, plan_jobs
from dtfcli.hub.upload import prepare_upload
from dtfcli.loading.build import build_model
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.runs.files import read_metrics
from dtfcli.runs.folder import processes_of, run_settings
from dtfcli.settings.data import Source
from dtfcli.settings.schema import load_settings
from dtfcli.training.checkpoint import find_checkpoint
from tests.strangers.damage import Damage, any_of, damage_bytes, damage_json, damage_lines

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        folder: healthy folder that a case starts from.
        file: in it, the one that is damaged.
        read: takes the copy of the folder.
        damage: what a case does to the file.
        named: whether the user names the file itself, so that a link is followed wherever it leads.
    """

    folder: str
    file: str
    read: Callable[[Path], Any]
    damage: Damage
    named: bool = False


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a fixed row."""
    with torch.inference_mode():
        return model(IDS).logits


def _model(folder: Path) -> Any:
    return logits(load_model(folder, device="cpu"))


def _gguf(folder: Path) -> Any:
    return logits(load_model(folder / "small.gguf", device="cpu"))


def _gguf_tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder / "small.gguf")("a b c")["input_ids"]


def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)("a b c w30")["input_ids"]


def _generation(folder: Path) -> Any:
    return load_model(folder, device="cpu").generation_config.to_dict()


def _dry_run(folder: Path) -> Any:
    settings = load_settings(None, [f"model.base={folder}", "model=dense"])
    return sum(parameter.numel() for parameter in build_model(settings, meta=True).parameters())


def _checkpoint(folder: Path) -> Any:
    found = find_checkpoint(folder, lambda message: None)
    assert found is not None, "one of the two is whole"
    return found[1].step, processes_of(folder)


def _upload(folder: Path) -> Any:
    return sorted(prepare_upload(folder, "me/new").files)


def _texts(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        (reader,) = open_sources([Source(path=str(folder / name))])
        report = reader.new_report()
        return [text for _, text in reader.texts(report)], report

    return read


def _task(folder: Path) -> Any:
    index = TaskIndex(["arc_easy"], folder / "tasks")  # without the thousands of lm-eval's own
    if "strangers_task" not in index.manager.task_index:
        raise ConfigError(f"{folder}: the task has another name, or none.")
    jobs = plan_jobs(["strangers_task"], index)
    return load_job(jobs[0], index, folder / "data").requests()


def _evaluation(folder: Path) -> Any:
    path = folder / "eval" / "latest.json"
    return json.dumps(EvalReport.read(path, str(path)).to_dict())


JSON = any_of(damage_json)
BYTES = any_of(damage_bytes)
LINES = any_of(damage_lines)
READERS: dict[str, Reader] = {
    "config of a dense model": Reader("models/dense", "config.json", _model, JSON),
    "config of a routed model": Reader("models/routed", "config.json", _model, JSON),
    "config, dry run": Reader("models/dense", "config.json", _dry_run, JSON),
    "weights": Reader("models/routed", "model.safetensors", _model, BYTES),
    "index": Reader("models/sharded", "model.safetensors.index.json", _model, JSON),
    "shard": Reader("models/sharded", "model-00002-of-00006.safetensors", _model, BYTES),
    "generation config": Reader("models/routed", "generation_config.json", _generation, JSON),
    "tokenizer": Reader("models/dense", "tokenizer.json", _tokenizer, JSON),
    "tokenizer config": Reader("models/dense", "tokenizer_config.json", _tokenizer, JSON),
    "adapter config": Reader("models/adapter", "adapter_config.json", _model, JSON),
    "adapter weights": Reader("models/adapter", "adapter_model.safetensors", _model, BYTES),
    "adapter's routing": Reader("models/adapter", "config.json", _model, JSON),
    "GGUF": Reader("gguf", "small.gguf", _gguf, BYTES),
    "GGUF tokenizer": Reader("gguf", "small.gguf", _gguf_tokenizer, BYTES),
    "settings": Reader("run", "settings.toml", run_settings, BYTES),
    "settings of --config": Reader("run", "settings.toml", lambda f: load_settings(config=f / "settings.toml"), BYTES),
    "metrics": Reader("run", "metrics.jsonl", lambda folder: read_metrics(folder / "metrics.jsonl"), LINES),
    "checkpoint state": Reader("run", "checkpoints/step-000003/state.json", _checkpoint, JSON),
    "checkpoint tensors": Reader("run", "checkpoints/step-000003/model.safetensors", _checkpoint, BYTES),
    "evaluation": Reader("run", "eval/latest.json", _evaluation, JSON),
    "push, config": Reader("run", "final_model/config.json", _upload, JSON),
    "push, tokenizer": Reader("run", "final_model/tokenizer_config.json", _upload, JSON),
    "push, weights": Reader("run", "final_model/model.safetensors", _upload, BYTES),
    "push, settings": Reader("run", "settings.toml", _upload, BYTES),
    "push, metrics": Reader("run", "metrics.jsonl", _upload, LINES),
    "push, evaluation": Reader("run", "eval/latest.json", _upload, JSON),
    "text": Reader("texts", "text.txt", _texts("text.txt"), BYTES, named=True),
    "rows": Reader("texts", "rows.jsonl", _texts("rows.jsonl"), LINES, named=True),
    "table": Reader("texts", "table.parquet", _texts("table.parquet"), BYTES, named=True),
    "task file": Reader("texts", "tasks/task.yaml", _task, BYTES),
    "benchmark": Reader("texts", "data/somebody/words/test.jsonl", _task, LINES),
}
