"""Presets: TOML files of settings, shipped with the package. Find, read and copy them.

In the repository they lie in `presets/`, in an installed wheel in `dtfcli/presets/`. The first line of a
preset is a comment that says what it is for.
"""

import shutil
import tomllib
from pathlib import Path
from typing import Any

from dtfcli.errors import ConfigError, did_you_mean, reason_of


def presets_dir() -> Path:
    """The folder that holds the presets: inside the package in a wheel, beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in presets_dir().glob("*.toml"))


def preset_path(name: str) -> Path:
    """The file of a preset.

    Raises:
        ConfigError: no preset has this name.
    """
    names = preset_names()
    if name in names:
        return presets_dir() / f"{name}.toml"
    if name.endswith(".toml") or Path(name).is_file():
        raise ConfigError(f"'{name}' is a file, not a preset. Write --config {name} to use it.")
    hint = did_you_mean(name, names) or " `dtf presets list` shows them all."
    raise ConfigError(f"There is no preset '{name}'.{hint}")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a settings file.

    Raises:
        ConfigError: it is missing, unreadable, no text, or no TOML (with line and column).
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file. `dtf presets copy quickstart {path}` makes one to start from.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "give a TOML file" if path.is_dir() else "check its permissions"
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); give a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise ConfigError(f"{path}: not valid TOML: {reason_of(error)}; give a TOML file.") from error


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, as a nested table."""
    return read_toml(preset_path(name))


def preset_summary(name: str) -> str:
    """What a preset is for: its first line, which is a comment."""
    with preset_path(name).open(encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()


def copy_preset(name: str, target: Path) -> Path:
    """Copy a preset to `target` (a file, or a folder that exists) and return where it went.

    Raises:
        ConfigError: something is there already, or the folder is missing or not writable.
    """
    source = preset_path(name)
    if target.is_dir():
        target = target / source.name
    try:
        with source.open("rb") as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer)
    except FileExistsError as error:
        raise ConfigError(f"{target}: exists and is not overwritten. Choose another name.") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{target}: the folder {target.parent} does not exist. Make it first.") from error
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}). Choose another place.") from error
    return target
