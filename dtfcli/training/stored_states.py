"""Reads the files of a checkpoint as data: whoever made them, none of them runs code.

`accelerate` reads with `weights_only`. torch's distributed checkpoints have two places where a pickle could call
anything: `.metadata`, and entries that are no tensors. Here both are read with a list of what may be in them.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import load
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.api import CheckpointException

from dtfcli.errors import BROKEN, CheckpointError, DTFError, leads_out, reading, reason_of

METADATA = ".metadata"
_UNFIT = "not as dtf saves it, and nothing in it was run"
_PICKLES = ("pytorch_model*.bin", "optimizer*.bin", "scheduler*.bin", "scaler*.pt")
_RANDOM_STATES = "random_states_*.pkl"
_RANDOM_KEYS = {"random_state", "numpy_random_seed", "torch_manual_seed"}
_DAMAGE: tuple[type[Exception], ...] = (*BROKEN, pickle.UnpicklingError)
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {*kinds.__all__, "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
}
"""What `.metadata` may name, by module; none of it does more than hold values."""
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
"""Where it was written, perhaps under another system."""


class _Unpickler(pickle._Unpickler):  # the readable one: the fast one lets nobody look at a step
    """Reads a pickle that names nothing but what `.metadata` is made of."""

    dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _PATHS[name]
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def _build(self: Any) -> None:
        """Fill an object; a class would be changed for everybody."""
        if isinstance(self.stack[-2], type):
            raise pickle.UnpicklingError("it changes a class")
        self.load_build()

    dispatch[pickle.BUILD[0]] = _build


class _Reader(dcp.FileSystemReader):
    """Takes metadata that have been read."""

    def __init__(self, folder: Path, metadata: kinds.Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> kinds.Metadata:
        """Those given."""
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
    """Takes entries that are no tensors, the optimizer's numbers, as data."""

    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        """Read them as weights are; torch's own planner, which would read anything, gets them written afresh."""
        checked = BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def _remedy(folder: Path) -> str:
    return f"delete {folder} to go on from the checkpoint before it, or start a new run"


def load_shards(states: dict[str, Any], folder: Path) -> None:
    """Fill states, in place, from the folder that `torch.distributed.checkpoint` wrote inside a checkpoint.

    Raises:
        CheckpointError: a file names code or another place, is damaged, or does not fit the states.
    """
    metadata = _read_metadata(folder)
    with reading(folder, _remedy(folder.parent), what=_UNFIT):
        try:
            dcp.load(states, storage_reader=_Reader(folder, metadata), planner=_Planner())
        except CheckpointException as error:  # which is no Exception
            raise ValueError(reason_of(next(iter(error.failures.values()))[0])) from error


def _read_metadata(folder: Path) -> kinds.Metadata:
    path, remedy = folder / METADATA, _remedy(folder.parent)
    with reading(path, remedy, also=(pickle.UnpicklingError, MemoryError), what=_UNFIT):
        metadata = _Unpickler(BytesIO(path.read_bytes())).load()  # lengths in it ask for no memory beyond the file
        if not isinstance(metadata, kinds.Metadata):
            raise ValueError(f"it holds {type(metadata).__name__}")
        names = {place.relative_path for place in metadata.storage_data.values()}
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{path}: names a file outside its folder ({str(name)[:80]!r}); {remedy}.")
        with reading(folder / name, remedy):
            if leads_out(folder, folder / name):
                raise CheckpointError(f"{folder / name}: a link out of its folder, which is not followed; {remedy}.")
    return metadata


@contextmanager
def explained_states(folder: Path) -> Iterator[None]:
    """Around `accelerate`'s reading of a checkpoint, which passes over random states that it cannot read in silence.

    Raises:
        CheckpointError: names the file that is damaged or holds code, or the folder if what it holds does not fit.
    """
    for path in sorted(folder.glob(_RANDOM_STATES)):
        with reading(path, _remedy(folder), also=(pickle.UnpicklingError,), what=_UNFIT):
            found = load(path)
            if not isinstance(found, dict) or not found.keys() >= _RANDOM_KEYS:
                raise ValueError("it holds no states of random generators")
    try:
        yield
    except DTFError:
        raise
    except _DAMAGE as error:
        for path in sorted(path for pattern in _PICKLES for path in folder.glob(pattern)):
            with reading(path, _remedy(folder), also=(pickle.UnpicklingError,), what=_UNFIT):
                load(path, map_location="cpu")
        raise CheckpointError(f"{folder}: does not fit this run ({reason_of(error)}); {_remedy(folder)}.") from error
