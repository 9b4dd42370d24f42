"""Runs that exist, as a study: points are told apart by the settings in which the runs differ."""

from collections.abc import Sequence
from pathlib import Path

from dtfcli.errors import ConfigError
from dtfcli.runs.folder import run_settings
from dtfcli.settings import Settings
from dtfcli.studies.grid import Cell, check_equal_terms, resolved
from dtfcli.studies.measure import measure
from dtfcli.studies.report import Finished

_POINTS = ("model.architecture", "model.capacity")


def finished_runs(folders: Sequence[Path]) -> list[Finished]:
    """Measure runs that exist.

    Raises:
        ConfigError: one is named twice, or they differ in more than architecture, capacity and seed.
        CheckpointError: a folder is not a run, or has no final model or validation loss.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("--from: a run is named twice; name each once.")
    settings = [run_settings(folder) for folder in folders]
    check_equal_terms(settings, _POINTS)
    cells = [_cell(own) for own in settings]
    seen: dict[tuple[str, int], Path] = {}
    for cell, own, folder in zip(cells, settings, folders, strict=True):
        other = seen.setdefault((cell.name, own.run.seed), folder)
        if other is not folder:
            raise ConfigError(f"--from: {other} and {folder} are both {cell.name} with seed {own.run.seed}; name one.")
    return [
        Finished(cell, own.run.seed, folder, measure(folder))
        for cell, own, folder in zip(cells, settings, folders, strict=True)
    ]


def _cell(settings: Settings) -> Cell:
    """The point of a run: its architecture, and its capacity unless it is dense."""
    values: list[str] = [settings.model.architecture]
    if values != ["dense"]:
        capacity = resolved(settings)["model"]["capacity"]
        shares = capacity if isinstance(capacity, list) else [capacity]
        values.append(",".join(f"{share:g}" for share in shares))
    return Cell(" ".join(values), dict(zip(_POINTS, values, strict=False)), ())
