"""Run folders: OUTPUT_DIR/<date>/<name>/, never overwritten, found again by their settings.toml."""

import datetime
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pydantic import ValidationError

from dtfcli.errors import CheckpointError, ConfigError, did_you_mean
from dtfcli.runs.files import explained_write_errors
from dtfcli.settings import Settings
from dtfcli.settings.describe import STRUCK, problems
from dtfcli.settings.sources import lookup, remove

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SETTINGS_FILE = "settings.toml"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
FINAL_MODEL = "final_model"
BEST_MODEL = "best_model"
MERGED_MODEL = "merged_model"
"""The plain model that `lora.merge` writes next to the final adapters."""
CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
"""Of a checkpoint: where the run stood, and the hashes of its files."""
EVALUATIONS = "eval"
"""Results of `dtf eval`, in a run folder or a model folder."""

_CHECKPOINT_NAME = re.compile(r"step-\d{1,12}")
_MOST_PROCESSES = 2**16


def new_run_folder(settings: Settings, *, rename: bool) -> Path:
    """The path of a new run's folder; where today has a run of the name, `rename` appends -2, -3 and so on.

    Raises:
        ConfigError: today has a run of this name.
    """
    day = Path(settings.run.output_dir).expanduser() / datetime.date.today().isoformat()
    folder, count = day / settings.run.name, 1
    while folder.exists():
        if not rename:
            raise ConfigError(
                f"run.name = {settings.run.name!r}: {folder} exists and is not overwritten. Choose another name "
                f"(run.name={settings.run.name}-2), or go on with it (--resume {folder})."
            )
        count += 1
        folder = day / f"{settings.run.name}-{count}"
    return folder


def create_run_folder(folder: Path, settings: Settings) -> None:
    """Make a run folder with its resolved settings: both appear at once, whenever the process is killed.

    Raises:
        ConfigError: another run took the name meanwhile.
        DTFError: the folder cannot be written.
    """
    with explained_write_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.parent.parent / f".{folder.name}.{os.getpid()}"
        partial.mkdir()
        try:
            (partial / SETTINGS_FILE).write_text(settings.to_toml(), encoding="utf-8")
            partial.rename(folder)
        except OSError as error:
            if folder.exists():  # with another run's settings in it
                raise ConfigError(f"{folder}: another run took this name just now; choose another run.name.") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def run_settings(folder: Path) -> Settings:
    """The settings of an existing run, exactly as it was started: the environment has no say.

    Raises:
        CheckpointError: this is not a run folder, or its settings are damaged or of an earlier version.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = "" if folder.is_dir() else did_you_mean(folder.name, siblings)
        raise CheckpointError(f"{folder}: no run to resume (it has no {SETTINGS_FILE}).{hint}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        for key, (neutral, _) in STRUCK.items():
            if lookup(values, key) == neutral:
                remove(values, key)
        return Settings.model_validate(values)
    except ValidationError as error:
        problem = problems(Settings, error)[0].text
        raise CheckpointError(f"{path}: damaged, or of another version. {problem} Start a new run.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, the run cannot be resumed. Start a new one.") from error


def locked(run: Path) -> AbstractContextManager[bool]:
    """Lock a run while it is trained, so that it is not resumed meanwhile; `locked_file` has the details."""
    busy = f"{run}: another process is training or saving this run; stop it first, or wait until it ends."
    return locked_file(run / SETTINGS_FILE, busy)


@contextmanager
def locked_file(path: Path, busy: str) -> Iterator[bool]:
    """Lock a file that exists; the system unlocks it when the process ends, however it does.

    Yields:
        False where the file system has no locks. Windows is not asked.

    Raises:
        ConfigError: another process holds it; the text is `busy`.
        DTFError: the file cannot be written.
    """
    with explained_write_errors(path.parent):
        file = path.open("r+b")  # a network file system locks only what can be written
    with file:
        works = True
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(busy) from error
        except OSError:
            works = False
        yield works


def processes_of(run: Path) -> int | None:
    """How many processes trained a run up to its newest checkpoint that can be read; None: there is none."""
    for folder in list_checkpoints(run):
        try:
            count = json.loads((folder / STATE_FILE).read_text("utf-8"))["state"]["processes"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(count, int) and 0 < count <= _MOST_PROCESSES:
            return int(count)
    return None


def newest_run(output_dir: Path) -> Path:
    """The unfinished run that was written to last.

    Raises:
        CheckpointError: there is none.
    """
    runs = [path.parent for path in output_dir.glob(f"*/*/{SETTINGS_FILE}")]
    unfinished = [run for run in runs if not (run / FINAL_MODEL).exists()]
    if not unfinished:
        reason = f"all {len(runs)} have finished" if runs else "there are none"
        raise CheckpointError(f"{output_dir}: no run to resume ({reason}). Give a run folder: --resume RUN_DIR.")
    return max(unfinished, key=_last_written)


def _last_written(run: Path) -> float:
    paths = (run / METRICS_FILE, run / SETTINGS_FILE)
    return max(path.stat().st_mtime for path in paths if path.exists())


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    paths = (run_dir / CHECKPOINTS).glob("step-*")
    return sorted((path for path in paths if _CHECKPOINT_NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))
