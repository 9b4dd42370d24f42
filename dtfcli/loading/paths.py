"""What the user's MODEL means: a model folder, a run folder, a .gguf file, or a Hub id, optionally with @revision."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtfcli.errors import CheckpointError, did_you_mean
from dtfcli.runs.folder import BEST_MODEL, CHECKPOINTS, FINAL_MODEL, SETTINGS_FILE, STATE_FILE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class ModelPath:
    """Where a model comes from.

    Attributes:
        kind: folder, gguf (a file) or hub.
        path: the folder or file, or the Hub id.
        revision: branch, tag or commit on the Hub; None: its default.
    """

    kind: Literal["folder", "gguf", "hub"]
    path: str
    revision: str | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it is a folder of adapters (LoRA), which name the base that they belong to."""
        return self.kind == "folder" and (Path(self.path) / _ADAPTER).is_file()


def resolve_model_path(model: str | Path, revision: str | None = None) -> ModelPath:
    """Find out what MODEL is.

    Args:
        model: model or adapter folder, run folder (its final model, else its best), .gguf file, or Hub id[@revision].
        revision: of a Hub id; says the same as @revision.

    Raises:
        CheckpointError: nothing is there, or something that is not a model; says what it is and what to give instead.
    """
    text = str(model)
    path = Path(text).expanduser()
    if text and path.exists():
        found = _local(path)
        if revision:
            raise CheckpointError(f"{text} is on this machine: revision = {revision!r} is for models on the Hub.")
        return found
    hub_id, _, at_revision = text.partition("@")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(hub_id) or _looks_local(hub_id):
        siblings = _siblings(path)
        hint = did_you_mean(path.name, siblings).replace(" '", f" '{_prefix(text)}", 1)
        remedy = hint or " Give a model folder or a Hub id."
        raise CheckpointError(f"{text or repr(text)}: no such file or folder.{remedy}")
    if at_revision and revision and at_revision != revision:
        raise CheckpointError(f"{text}: names a revision, and revision = {revision!r} names another; give one.")
    return ModelPath("hub", hub_id, at_revision or revision or None)


def _looks_local(hub_id: str) -> bool:
    """Whether something that does not exist was meant as a path: a known suffix, or a first folder that is here."""
    first, slash, _ = hub_id.partition("/")
    return hub_id.endswith((".gguf", ".safetensors", ".toml")) or (bool(slash) and Path(first).is_dir())


def _siblings(path: Path) -> list[str]:
    parent = path.parent
    return [entry.name for entry in parent.iterdir()] if parent.is_dir() else []


def _prefix(text: str) -> str:
    return text[: len(text) - len(Path(text).name)]


def _local(path: Path) -> ModelPath:
    if path.is_file():
        return _file(path)
    if (path / _ADAPTER).is_file():
        return ModelPath("folder", str(path))
    if (path / "config.json").is_file():
        if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
            raise CheckpointError(f"{path}: has a config.json but no weights (model.safetensors); copy them there.")
        return ModelPath("folder", str(path))
    for name in (FINAL_MODEL, BEST_MODEL):
        if (path / name / "config.json").is_file():
            return ModelPath("folder", str(path / name))
    raise CheckpointError(f"{path}: {_what_it_is(path)}")


def _file(path: Path) -> ModelPath:
    if path.suffix == ".gguf":
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file (it does not start with GGUF); download it again.")
        return ModelPath("gguf", str(path))
    if (path.parent / "config.json").is_file():
        raise CheckpointError(f"{path}: a file of a model; give its folder, {path.parent}.")
    raise CheckpointError(f"{path}: a file, but not a model; give a model folder, a run folder or a .gguf file.")


def _what_it_is(folder: Path) -> str:
    """Why a folder is not a model, and what to give instead."""
    entries = sorted(folder.iterdir())
    if not entries:
        return "an empty folder; give a model folder, a run folder or a Hub id."
    if (folder / STATE_FILE).is_file() and folder.parent.name == CHECKPOINTS:
        return f"a training checkpoint; go on with it by `dtf train --resume {folder.parent.parent}`."
    if (folder / SETTINGS_FILE).is_file():
        return f"a run that has not finished; go on with it by `dtf train --resume {folder}`."
    gguf = [entry for entry in entries if entry.suffix == ".gguf"]
    if gguf:
        return f"a folder of .gguf files; name one, such as {gguf[0]}."
    inside = [entry for entry in entries if (entry / "config.json").is_file() or (entry / SETTINGS_FILE).is_file()]
    if inside:
        return f"not a model itself; inside it are {', '.join(str(entry) for entry in inside[:3])}."
    return "not a model folder (it has no config.json); give a model folder, a run folder or a Hub id."


def weights_hash(path: Path) -> str:
    """What weights are known by: sha256 over names and contents of a folder's weight files, or over one file; hex."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        digest.update(file.name.encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
