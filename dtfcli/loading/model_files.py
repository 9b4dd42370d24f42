"""The files of a model folder: which they are, that they stay inside the folder, and the hash of the weights.

A library that reads a damaged file raises an error, which `load.explained_load_errors` words. No library checks where
files lie: here no file is a link out of its folder, except into the Hub's cache, which is made of such links, and no
index names a file outside.
"""

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dtfcli.errors import CheckpointError, leads_out, read_json_object, reading

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED_ADAPTER = "adapter_model.bin"
_READ = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf", ".py"}
"""Endings of files that libraries read in a model folder."""
_AGAIN = "save or download the model again"


def check_files(folder: Path) -> dict[str, int]:
    """Check that nothing in a model or adapter folder leads out of it.

    Returns:
        The number of tensors in each safetensors file of a model, without shards of an earlier save.

    Raises:
        CheckpointError: a file is a link out of the folder, or the index is damaged or names files outside, or a file
            of weights is damaged.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ and file.is_symlink():
            with reading(file, "put the file itself there"):
                outside = leads_out(folder, file)
            if outside:
                raise CheckpointError(f"{file}: a link out of its folder, which is not followed; copy the file there.")
    names = [WEIGHTS] if (folder / WEIGHTS).exists() else _shards(folder)
    tensors = {}
    for name in names:
        with reading(folder / name, _AGAIN, also=(SafetensorError,), what="not a safetensors file"):
            tensors[name] = len(safe_open(folder / name, "pt").keys())
    return tensors


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return []
    weight_map = read_json_object(index, _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map does not name the file of each weight; {_AGAIN}.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index}: names files outside its folder ({name!r}); {_AGAIN}.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: has no {name}, which {INDEX} names; copy it there.")
    return names


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises:
        CheckpointError: it is damaged, names no base, or its weights are missing.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json_object(path, "save the adapter again")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{path}: base_model_name_or_path = {base!r}: names no base model; write its folder or Hub id there."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = f", only {_PICKLED_ADAPTER}, a pickle" if (folder / _PICKLED_ADAPTER).is_file() else ""
        raise CheckpointError(f"{folder}: an adapter without {ADAPTER_WEIGHTS}{pickled}; copy it there.")
    return config


def weights_hash(path: Path) -> str:
    """The sha256 of weights: over names and contents of a folder's weight files, or over one file; hex."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        digest.update(file.name.encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
