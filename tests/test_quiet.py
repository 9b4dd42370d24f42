"""Libraries are silent while we show things, and as talkative as before afterwards."""

import logging
import sys

import datasets
import pytest
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from dtfcli.quiet import quiet_libraries


def _voices() -> tuple[object, ...]:
    levels = [logging.getLogger(name).level for name in ("accelerate", "huggingface_hub", "transformers")]
    bars = datasets.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    return *levels, *bars, modeling_gguf_pytorch_utils.tqdm


def test_libraries_are_silent_and_speak_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = _voices()
    with quiet_libraries(), quiet_libraries():
        sys.stdout.write("noise\n")
        assert not datasets.is_progress_bar_enabled()
        assert not transformers_logging.is_progress_bar_enabled()
        assert not logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING)
        assert modeling_gguf_pytorch_utils.tqdm(range(3)).disable
    assert _voices() == before
    assert capsys.readouterr() == ("", "")


def test_bars_and_prints_can_be_kept(capsys: pytest.CaptureFixture[str]) -> None:
    before = _voices()
    with quiet_libraries(bars=True):
        assert datasets.is_progress_bar_enabled() == before[-3]
    with quiet_libraries(prints=True):
        sys.stdout.write("ours\n")
    assert capsys.readouterr() == ("ours\n", "")
    with quiet_libraries(verbose=True):
        sys.stdout.write("noise\n")
    assert capsys.readouterr() == ("", "noise\n")
    with pytest.raises(ValueError, match="x"), quiet_libraries():
        raise ValueError("x")
    assert _voices() == before
