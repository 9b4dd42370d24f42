"""What the tests of data share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dtfcli.data import tokenizer as tokenization
from dtfcli.data.documents import Document
from dtfcli.data.tokenizer import train_tokenizer
from dtfcli.settings.data import DataSettings, Source
from tests.data.texts import VOCABULARY, sentence


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((Document(sentence(i)) for i in range(50)), VOCABULARY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty text files."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i:02}.txt").write_text(sentence(i))
    return texts


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., DataSettings]:
    """Data settings for one path (or several sources), with small blocks and a cache of their own."""

    def make(path: Path | str | None = None, *, source: dict[str, Any] | None = None, **values: Any) -> DataSettings:
        if "sources" not in values:
            values["sources"] = [Source(**{"path": str(path), **(source or {})})]
        return DataSettings(
            **{"seq_len": 16, "validation_fraction": 0.1, "cache_dir": str(tmp_path / "cache"), **values}
        )

    return make


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one whenever texts are going to be tokenized."""
    calls: list[str] = []
    original = tokenization.text_encoder

    def counted(tokenizer: Any, control_tokens: bool = False) -> Any:
        if not control_tokens:
            calls.append(tokenizer.name_or_path)
        return original(tokenizer, control_tokens)

    monkeypatch.setattr(tokenization, "text_encoder", counted)
    return calls
