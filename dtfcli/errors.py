"""Errors that end a command with one or two lines instead of a traceback.

A message names the field or file, the value found there, and the remedy. The exit codes are those of the
command line: 1 failed while running, 2 the user's input is wrong.
"""

import difflib
from collections.abc import Iterable


class DTFError(Exception):
    """Anything that goes wrong in a way the user can understand."""

    exit_code = 1


class ConfigError(DTFError):
    """A setting, option, preset or prompt is wrong."""

    exit_code = 2


class DataError(DTFError):
    """Training or evaluation text cannot be used as given."""

    exit_code = 2


class CheckpointError(DTFError):
    """A model folder, checkpoint or GGUF file cannot be used as given."""

    exit_code = 2


class HubError(DTFError):
    """The Hugging Face Hub refused or could not be reached."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest candidate, or "" when none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
