"""Hub data sets, with the Hub replaced or switched off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets.exceptions import DatasetNotFoundError

from dtfcli.data.prepare import prepare_data
from dtfcli.errors import ConfigError, DataError
from tests.data.texts import sentence, source, texts_of


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Let `datasets.load_dataset` return or raise something; gives the list of its calls."""
    import datasets

    def answer(result: Any) -> list[Any]:
        calls: list[Any] = []

        def load_dataset(*args: Any, **options: Any) -> Any:
            calls.append((*args, options))
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return answer


def test_hub_data_set(hub: Any, make: Any, tokenizer: Any, encodings: list[str]) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"id": list(range(40)), "article": [sentence(i) for i in range(40)]})
    calls = hub(rows)
    data = make("owner/name", source={"name": "en", "split": "train[:50%]"})
    messages: list[str] = []
    first = prepare_data(data, tokenizer, seed=0, on_progress=lambda message, _: messages.append(message))
    assert calls == [("owner/name", "en", {"split": "train[:50%]"})]
    assert messages[0] == "Loading owner/name from the Hub"
    assert first.documents == (36, 4)
    prepare_data(data, tokenizer, seed=0)
    assert len(encodings) == 1
    hub(datasets.Dataset.from_dict({"article": [sentence(i) for i in range(41)]}))
    assert prepare_data(data, tokenizer, seed=0).fingerprint != first.fingerprint


def test_hub_columns_are_checked(hub: Any) -> None:
    import datasets

    hub(datasets.Dataset.from_dict({"messages": [[{"role": "user"}]], "label": [1]}))
    with pytest.raises(DataError, match=r"owner/name' \(Hub\): no column 'text', but messages, label"):
        texts_of(source("owner/name"))


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (ConnectionError("Couldn't reach 'o/n' on the Hub"), DataError, "Hub cannot be reached.*local folder or file"),
        (TimeoutError(), DataError, "Hub cannot be reached"),
        (ValueError("Unknown split \"tran\". Should be one of ['train']"), ConfigError, r"\.split = 'tran' .*'train'"),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['en', 'de']"),
            ConfigError,
            r"\.name = 'x' of 'owner/name': Available: \['en', 'de'\]\.",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample"),
            ConfigError,
            r"available configs: \['a', 'b'\]\.",
        ),
        (RuntimeError("Dataset scripts are no longer supported\nmore"), DataError, "scripts are no longer supported"),
        (KeyError("odd"), DataError, "cannot be opened: 'odd'"),
        (DatasetNotFoundError("no 'o/n'"), DataError, "neither a local file or folder nor a data set.*hf auth login"),
    ],
)
def test_hub_errors_become_one_line(hub: Any, error: Exception, kind: type[Exception], expected: str) -> None:
    hub(error)
    with pytest.raises(kind, match=expected) as raised:
        texts_of(source("owner/name", name="x", split="tran"))
    assert "\n" not in str(raised.value)
    assert "data.sources[0]" in str(raised.value)


@pytest.mark.parametrize("name", ["text", "json", "parquet"])
def test_name_of_a_file_format_does_not_gather_files(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=f"path = '{name}': no such file or folder"):
        texts_of(source(name))


def test_offline_hub_for_real(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"the Hub cannot be reached \(offline\?\)"):
        texts_of(source("owner/name"))
    assert capsys.readouterr() == ("", "")
