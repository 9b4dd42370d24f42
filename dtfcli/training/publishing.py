"""The push at the end of a run: it may fail, and the run is none the worse for it."""

import shlex
from pathlib import Path

from dtfcli.errors import DTFError
from dtfcli.settings.groups import HubSettings
from dtfcli.training.tracking import Event, Listener


def is_logged_in() -> bool:
    """Whether a token for the Hub is at hand; asks nobody."""
    from huggingface_hub import get_token

    return get_token() is not None


def push_final_model(settings: HubSettings, model: Path, emit: Listener) -> str | None:
    """Push the model of a finished run where `hub.repo` says.

    Args:
        settings: `hub.*` of the run.
        model: the final model, saved.
        emit: takes phases and warnings.

    Returns:
        The URL; None without `hub.repo`, or where it failed, which is told as a warning with the command to repeat.
    """
    if not settings.repo:
        return None
    from dtfcli.hub.push import PushOptions, push

    private = " --private" if settings.private else ""
    again = f"The model is saved. Push it with: dtf push {shlex.quote(str(model))} {settings.repo}{private}"
    try:
        result = push(
            model,
            settings.repo,
            PushOptions(private=settings.private),
            on_progress=lambda message: emit(Event("phase", message[0].upper() + message[1:])),
        )
    except KeyboardInterrupt:
        emit(Event("warning", again))
        raise
    except Exception as error:  # whatever it is, the run has its model
        problem = str(error) if isinstance(error, DTFError) else f"{type(error).__name__}: {error}"
        emit(Event("warning", f"Not pushed: {problem}\n{again}"))
        return None
    for warning in result.warnings:
        emit(Event("warning", warning))
    return result.url
