"""A model path is walked once: from `dtf generate MODEL` to the first logits, few functions of ours are handed it."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import dtfcli
from dtfcli.loading.source import ModelSource
from tests.conftest import Outcome
from tests.tiny import dense_model, routed_model, word_tokenizer

OURS = str(Path(dtfcli.__file__).parent)


def holds(value: Any, path: str) -> bool:
    """Whether an argument is the path, holds it in a list, or is the value that stands for it."""
    if isinstance(value, list | tuple):
        return any(holds(item, path) for item in value)
    return isinstance(value, ModelSource) or (isinstance(value, str | Path) and str(value) == path)


@pytest.mark.parametrize("kind", ["dense", "routed"])
def test_at_most_fifteen_functions_each_once(dtf: Callable[..., Outcome], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    (dense_model() if kind == "dense" else routed_model()).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    calls: Counter[str] = Counter()
    frames: list[FrameType] = []  # keeps each frame, so that a generator that goes on is no second call

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(OURS) or any(frame is known for known in frames):
            return
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(holds(frame.f_locals.get(name), str(folder)) for name in arguments):
            frames.append(frame)
            calls[f"{Path(code.co_filename).name}: {code.co_name}"] += 1

    sys.setprofile(watch)
    try:
        result = dtf("generate", str(folder), "a b", "-n", "1", "--device", "cpu")
    finally:
        sys.setprofile(None)
    assert result.code == 0, result
    assert set(calls.values()) == {1}, calls
    assert len(calls) <= 15, list(calls)
    assert {"source.py: open_source", "model_files.py: check_files", "source.py: configuration"} <= set(calls)
