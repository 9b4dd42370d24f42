"""Sends a run's metrics to Weights & Biases, TensorBoard and trackio, through accelerate's trackers.

Notable choices:

- They get the lines of metrics.jsonl under the same names, and the settings without paths of this machine.
- The run folder keeps the trackers' run ids, so that a resumed run continues in the same ones.
- A tracker that fails on the way is left out with a warning, and training goes on.
"""

import contextlib
import importlib.util
import inspect
import json
import math
import os
import shutil
import tomllib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from dtfcli.errors import ConfigError, DTFError, reason_of
from dtfcli.quiet import quiet_libraries
from dtfcli.runs.files import explained_write_errors, replaced_file
from dtfcli.runs.public import public_settings
from dtfcli.settings import Settings
from dtfcli.settings.describe import flat_settings

TRACKERS_FILE = "trackers.json"
NAMES = ("wandb", "tensorboard", "trackio")
_TRACKIO_PROJECT = "dtf"
_OFFLINE_MODES = ("offline", "dryrun", "disabled")


def enabled_trackers(settings: Settings) -> list[str]:
    """The trackers that `logging.*` enables."""
    return [name for name in NAMES if getattr(settings.logging, name).enabled]


def check_trackers(settings: Settings) -> None:
    """Raise ConfigError, with the remedy, unless the enabled trackers are installed and logged in."""
    for name in enabled_trackers(settings):
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:  # a folder of that name is not a package
            raise ConfigError(
                f"logging.{name}.enabled = true: the package {name} is not installed; pip install 'dtfcli[{name}]'."
            )
        if name == "wandb" and not _can_start_wandb():
            raise ConfigError(
                "logging.wandb.enabled = true: not logged in to Weights & Biases; run `wandb login`, or set "
                "WANDB_MODE=offline."
            )


def _can_start_wandb() -> bool:
    """Whether W&B is offline, or a key is at hand. Does not ask the user, as `wandb.init` would."""
    if os.environ.get("WANDB_MODE") in _OFFLINE_MODES or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    if wandb.setup().settings.mode in _OFFLINE_MODES:
        return True
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # before 0.31 or so


class Trackers:
    """The trackers of a run; none until they are started, and none in processes that only train."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """`warn` is called when a tracker fails later."""
        self.trackers: list[GeneralTracker] = []
        self._warn = warn

    def start(self, settings: Settings, folder: Path, *, step: int, resumed: bool) -> None:
        """Start the trackers that `logging.*` enables, or go on in their runs of a resumed run.

        After a resume they receive the lines beyond `step`, the steps made, once more.

        Raises:
            DTFError: a tracker does not start; the folder of a new run is removed.
        """
        for name in enabled_trackers(settings):
            tracker = _build(name, settings, folder, step)
            try:
                with quiet_libraries():  # stdout holds the model's path alone
                    tracker.start()
                    if not resumed:
                        tracker.store_init_configuration(tracker_config(settings, folder))
            except Exception as error:  # the services raise errors of any kind
                self.finish()
                if not resumed:  # a run that never began
                    shutil.rmtree(folder, ignore_errors=True)
                reason = reason_of(error)
                raise DTFError(
                    f"logging.{name}.enabled = true: it does not start ({reason}). Mend that, or leave it out."
                ) from error
            self.trackers.append(tracker)

    def log(self, line: dict[str, Any]) -> None:
        """Pass a line of metrics.jsonl on."""
        values = {
            name: value
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for tracker in list(self.trackers):
            with self._dropped_on_failure(tracker):
                tracker.log(values, step=line["step"])

    def finish(self) -> None:
        """Let the trackers write their buffers."""
        for tracker in list(self.trackers):
            with self._dropped_on_failure(tracker):
                tracker.finish()
        self.trackers.clear()

    @contextlib.contextmanager
    def _dropped_on_failure(self, tracker: GeneralTracker) -> Iterator[None]:
        try:
            with quiet_libraries():  # stdout holds the model's path alone
                yield
        except Exception as error:  # whatever it is, the run goes on
            if tracker in self.trackers:
                self.trackers.remove(tracker)
            self._warn(f"logging.{tracker.name}: it failed and is left out from here on ({reason_of(error)}).")


class _Trackio(TrackioTracker):
    """accelerate's, ended as the library ends it: else it ends the run again at exit, with a line on stdout."""

    def finish(self) -> None:
        import trackio

        trackio.finish()


def _build(name: str, settings: Settings, folder: Path, step: int) -> GeneralTracker:
    if name == "tensorboard":
        # Beyond the checkpoint being resumed, the killed run may have written steps that come again.
        return TensorBoardTracker("tensorboard", str(folder), purge_step=step + 1 if step else None)
    identity = _identity(folder, name)
    if name == "trackio":
        return _Trackio(_TRACKIO_PROJECT, name=f"{folder.name}-{identity}", resume="allow")
    import wandb

    return WandBTracker(
        settings.logging.wandb.project,
        name=folder.name,
        id=identity,
        resume="allow",
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off"),
    )


def _identity(folder: Path, name: str) -> str:
    """The id of this run with a tracker: made once, and kept in the run folder."""
    path = folder / TRACKERS_FILE
    identities: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        identities = json.loads(path.read_text(encoding="utf-8"))
    if name not in identities:
        identities[name] = uuid.uuid4().hex[:8]
        with explained_write_errors(folder), replaced_file(path) as partial:
            partial.write_text(json.dumps(identities, indent=2) + "\n", encoding="utf-8")
    return str(identities[name])


def tracker_config(settings: Settings, folder: Path) -> dict[str, bool | int | float | str]:
    """The public part of the resolved settings under dotted names; lists as JSON."""
    public = flat_settings(public_settings(tomllib.loads(settings.to_toml()), folder))
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value, ensure_ascii=False)
        for name, value in public.items()
    }
