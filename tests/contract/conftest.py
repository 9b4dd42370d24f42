"""What the contract tests share."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.cases import exact, gpu


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of a case: the CPU or, in tests marked `gpu`, CUDA in exact float32."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    with exact():
        yield gpu()


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models' vocabulary."""
    return tiny.word_tokenizer()


@pytest.fixture(scope="session")
def smollm2_gguf() -> str:
    """A real pretrained model: the file DTF_SMOLLM2 names, or what ../shared/tools/get-smollm2 fetches."""
    if given := os.environ.get("TESTS_DTF_SMOLLM2"):
        return given
    root = Path(__file__).parents[2]
    fetch = Path(os.environ.get("TESTS_DTF_SHARED", root.parent / "shared")) / "tools" / "get-smollm2"
    if not fetch.exists():
        pytest.skip("no SmolLM2: set DTF_SMOLLM2 to its .gguf file")
    result = subprocess.run(["bash", str(fetch), str(root / ".cache")], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"SmolLM2 could not be fetched: {result.stderr[-200:]}")
    return result.stdout.strip().splitlines()[-1]
