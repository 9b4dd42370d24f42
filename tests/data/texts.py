"""What the tests of data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dtfcli.data.documents import documents
from dtfcli.settings.data import Source

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "small", "dogs", "ran", "past", "an", "old"]
VOCABULARY = 320


def sentence(number: int, words: int = 40) -> str:
    """A text of its own for every number."""
    rng = np.random.RandomState(number)
    return f"Text {number}: " + " ".join(rng.choice(WORDS, words)) + "."


def source(path: Path | str, **values: Any) -> Source:
    """An entry of `data.sources`."""
    return Source(**{"path": str(path), **values})


def texts_of(*sources: Source, seed: int = 0, **options: Any) -> list[str]:
    return [document.text for document in documents(sources, seed=seed, **options)]
