"""The push at the end of a run: it may fail, and the run is none the worse for it."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtfcli.settings import HubSettings


def is_logged_in() -> bool:
    """Whether a token for the Hub is at hand; asks nobody."""
    from huggingface_hub import get_token

    return get_token() is not None


def push_final_model(settings: HubSettings, model: Path, tell: Callable[[Any, str], None]) -> str | None:
    """Push the model of a finished run where `hub.repo` says.

    Args:
        settings: `hub.*` of the run.
        model: the final model, saved.
        tell: takes a kind of event (phase or warning) and a message.

    Returns:
        The URL; None without `hub.repo`, or where it failed: then `tell` has got the reason and the command to repeat.
    """
    if not settings.repo:
        return None
    from dtfcli.hub import push

    try:
        result = push(
            model,
            settings.repo,
            private=settings.private,
            on_progress=lambda message: tell("phase", message.capitalize()),
        )
    except Exception as error:  # whatever it is, hours of training must not end in a traceback
        private = " --private" if settings.private else ""
        command = f"dtf push {shlex.quote(str(model))} {settings.repo}{private}"
        tell("warning", f"{error}\nThe model is saved. Push it with: {command}")
        return None
    for warning in result.warnings:
        tell("warning", warning)
    return result.url
