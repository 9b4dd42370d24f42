"""Runs that exist, as a study: points are told apart by the settings in which the runs differ."""

from collections.abc import Sequence
from pathlib import Path

from dtfcli.errors import ConfigError
from dtfcli.runs.folder import run_settings
from dtfcli.settings import Settings
from dtfcli.studies.grid import Cell, check_equal_terms
from dtfcli.studies.measure import measure
from dtfcli.studies.report import Finished

_POINTS = ("model.architecture", "model.capacity")


def finished_runs(folders: Sequence[Path]) -> list[Finished]:
    """Measure runs that exist.

    Raises:
        ConfigError: one is named twice, or they differ in more than architecture, capacity and seed.
        CheckpointError: a folder is not a run, or has no final model or validation loss.
    """
    if len(set(folders)) < len(folders):
        raise ConfigError("--from: a run is named twice; name each once.")
    settings = [run_settings(folder) for folder in folders]
    check_equal_terms(settings, _POINTS)
    return [
        Finished(_cell(own), own.run.seed, folder, measure(folder))
        for own, folder in zip(settings, folders, strict=True)
    ]


def _cell(settings: Settings) -> Cell:
    """The point of a run: its architecture, and its capacity where it has one."""
    architecture, capacity = settings.model.architecture, settings.model.routing_fields().get("capacity")
    values = [architecture] if architecture == "dense" or capacity is None else [architecture, f"{capacity:g}"]
    return Cell(" ".join(values), dict(zip(_POINTS, values, strict=False)), ())
