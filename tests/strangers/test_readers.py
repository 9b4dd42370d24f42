"""Every reader meets damaged files: it reads them, or says in words which file and what to do.

A case takes a healthy folder and damages one file of it. Each case may take a limited amount of memory.
"""

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dtfcli.data.documents import open_sources
from dtfcli.errors import ConfigError, DTFError
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
from tests.budget import examples
from tests.strangers.damage import damage

CASES, MANY = 6, 60
"""For each of the readers: 186 in all in `make test-all`, and 1,860 of the tests marked `long`."""
_ROOM = 3 * 2**29
_NUMBERS = itertools.count()
QUIET: dict[str, Any] = {
    "database": None,
    "phases": [Phase.generate],  # a case names its damage, and takes too long to look for a smaller one
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}


def _model(folder: Path) -> Any:
    with torch.inference_mode():
        return load_model(folder, device="cpu")(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits


def _tokens(path: Path) -> Any:
    return load_tokenizer(path)("a b c w30")["input_ids"]


def _generation(folder: Path) -> Any:
    return load_model(folder, device="cpu").generation_config.to_dict()


def _evaluation(folder: Path) -> Any:
    return json.dumps(EvalReport.read(folder / "eval" / "latest.json").to_dict())


def _dry_run(folder: Path) -> Any:
    settings = load_settings(None, [f"model.base={folder}", "model=dense"])
    return sum(parameter.numel() for parameter in build_model(settings, meta=True).parameters())


def _checkpoint(folder: Path) -> Any:
    newest = find_checkpoint(folder, lambda message: None)
    assert newest is not None, "one of the two is whole"
    return newest[1].step, processes_of(folder)


def _upload(folder: Path) -> Any:
    return sorted(prepare_upload(folder, "me/new").files)


def _texts(name: str, folder: Path) -> Any:
    (reader,) = open_sources([Source(path=str(folder / name))])
    report = reader.new_report()
    return [text for _, text in reader.texts(report)], report


def load_task(folder: Path, trusted: bool = False) -> int:
    """Load the task of a folder, and count its requests."""
    index = TaskIndex(["arc_easy"], folder / "tasks", trusted)  # without the thousands of lm-eval's own
    if "strangers_task" not in index.manager.task_index:
        raise ConfigError(f"{folder}: the task has another name, or none.")
    return load_job(plan_jobs(["strangers_task"], index)[0], index, folder / "data").requests()


class Reader(NamedTuple):
    """A healthy folder, the file in it that a case damages, and what reads the copy of the folder."""

    folder: str
    file: str
    read: Callable[[Path], Any]


RUN, TEXTS = "small/run", "texts"
READERS = {
    "config of a dense model": Reader("models/dense", "config.json", _model),
    "config of a routed model": Reader("models/routed", "config.json", _model),
    "config, dry run": Reader("models/dense", "config.json", _dry_run),
    "weights": Reader("models/routed", "model.safetensors", _model),
    "index": Reader("models/sharded", "model.safetensors.index.json", _model),
    "shard": Reader("models/sharded", "model-00002-of-00006.safetensors", _model),
    "generation config": Reader("models/routed", "generation_config.json", _generation),
    "tokenizer": Reader("models/dense", "tokenizer.json", _tokens),
    "tokenizer config": Reader("models/dense", "tokenizer_config.json", _tokens),
    "adapter config": Reader("models/adapter", "adapter_config.json", _model),
    "adapter weights": Reader("models/adapter", "adapter_model.safetensors", _model),
    "adapter's routing": Reader("models/adapter", "config.json", _model),
    "GGUF": Reader("gguf", "small.gguf", lambda it: _model(it / "small.gguf")),
    "GGUF tokenizer": Reader("gguf", "small.gguf", lambda it: _tokens(it / "small.gguf")),
    "settings": Reader(RUN, "settings.toml", run_settings),
    "settings of --config": Reader(RUN, "settings.toml", lambda it: load_settings(config=it / "settings.toml")),
    "metrics": Reader(RUN, "metrics.jsonl", lambda it: read_metrics(it / "metrics.jsonl")),
    "checkpoint state": Reader(RUN, "checkpoints/step-000004/state.json", _checkpoint),
    "checkpoint tensors": Reader(RUN, "checkpoints/step-000004/model.safetensors", _checkpoint),
    "evaluation": Reader(RUN, "eval/latest.json", _evaluation),
    "push, config": Reader(RUN, "final_model/config.json", _upload),
    "push, tokenizer": Reader(RUN, "final_model/tokenizer_config.json", _upload),
    "push, weights": Reader(RUN, "final_model/model.safetensors", _upload),
    "push, settings": Reader(RUN, "settings.toml", _upload),
    "push, metrics": Reader(RUN, "metrics.jsonl", _upload),
    "push, evaluation": Reader(RUN, "eval/latest.json", _upload),
    "text": Reader(TEXTS, "text.txt", partial(_texts, "text.txt")),
    "rows": Reader(TEXTS, "rows.jsonl", partial(_texts, "rows.jsonl")),
    "table": Reader(TEXTS, "table.parquet", partial(_texts, "table.parquet")),
    "task file": Reader(TEXTS, "tasks/task.yaml", load_task),
    "benchmark": Reader(TEXTS, "data/somebody/words/test.jsonl", load_task),
}
FOLLOWED = ("text", "rows", "table")
"""The user names these files themselves, so that a link is followed wherever it leads."""


@contextmanager
def bounded_memory(room: int = _ROOM) -> Iterator[None]:
    """Let this process take only so many bytes more; beyond that, memory cannot be had."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of everything in a folder."""
    stats = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def check(name: str, rng: Random, healthy: Path, scratch: Path) -> None:
    """One case."""
    reader = READERS[name]
    folder = shutil.copytree(healthy / reader.folder, scratch / f"case{next(_NUMBERS)}" / "it")
    change = damage(rng, folder / reader.file)
    before, answer = states(folder.parent), None
    with bounded_memory():
        try:
            answer = reader.read(folder)
        except DTFError as error:
            message = str(error)
            assert str(folder) in message, (change, message)
            assert len(message.splitlines()) <= 4, (change, message)
            assert message.rstrip().endswith((".", "?", "…")), (change, message)
            assert not any(word in message for word in ("allocate", "SECRET")), (change, message)
    assert states(folder.parent) == before, change
    assert name in FOLLOWED or "SECRET" not in str(answer), change
    if isinstance(answer, torch.Tensor):
        assert answer.shape[:2] == (1, 8), change


@pytest.mark.parametrize("count", [examples(CASES), pytest.param(MANY, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", READERS)
def test_read_or_explained(name: str, count: int, healthy: Path, tmp_path: Path) -> None:
    @settings(max_examples=count, derandomize=count < MANY, **QUIET)
    @given(seed=st.integers(0, 2**32))
    def cases(seed: int) -> None:
        check(name, Random(seed), healthy, tmp_path)

    folder = shutil.copytree(healthy / READERS[name].folder, tmp_path / "whole")
    with bounded_memory():
        assert READERS[name].read(folder) is not None
    cases()
