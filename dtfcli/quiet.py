"""Keeps libraries from writing their own bars, remarks and prints while ours are shown.

A library that is not loaded has nothing to say, so none is imported for it.
"""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from importlib import import_module

_LOGGERS = ("accelerate", "datasets", "fsspec", "huggingface_hub", "lm-eval", "lm_eval", "transformers")
_SWITCHES = (
    ("datasets", "is_progress_bar_enabled", "disable_progress_bars", "enable_progress_bars"),
    ("transformers.utils.logging", "is_progress_bar_enabled", "disable_progress_bar", "enable_progress_bar"),
)
"""Module, and its functions that ask for, hide and show its bars; Transformers' switch those of huggingface_hub too."""
_WITHOUT_SWITCH = (
    "transformers.modeling_gguf_pytorch_utils",
    "lm_eval.api.model",
    "lm_eval.api.task",
    "lm_eval.models.huggingface",
)

_AT_IMPORT = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""They remark that kernels for other devices are missing, and torch remarks on torchao's enumerations."""


def quiet_imports() -> None:
    """Silence remarks of quantization libraries at their import: peft imports the installed ones."""
    for name in _AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_libraries(*, bars: bool = False, verbose: bool = False, prints: bool = False) -> Iterator[None]:
    """Silence the libraries that are loaded; stdout holds results alone.

    Args:
        bars: let them draw their progress bars.
        verbose: let them write everything; prints go to stderr.
        prints: let prints through, for a caller's own listener.
    """
    if verbose:
        with redirect_stdout(sys.stderr):
            yield
        return
    with ExitStack() as undo:
        if not prints:
            undo.enter_context(redirect_stdout(io.StringIO()))
        for logger in map(logging.getLogger, _LOGGERS):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if not bars:
            _hide_bars(undo)
        yield


def _hide_bars(undo: ExitStack) -> None:
    for name, shown, hide, show in _SWITCHES:
        module = sys.modules.get(name)
        if module is not None and getattr(module, shown)():
            undo.callback(getattr(module, show))
            getattr(module, hide)()
    for name in _WITHOUT_SWITCH:
        if name.partition(".")[0] in sys.modules:
            drawer = import_module(name)
            undo.callback(setattr, drawer, "tqdm", drawer.tqdm)
            drawer.tqdm = partial(drawer.tqdm, disable=True)  # type: ignore[attr-defined]
