"""The cache of tokenized text: one folder per fingerprint, read as memory maps.

Notable choices:

- A folder is written under another name and renamed when complete, so that a reader never sees half of one
  and two processes that build the same text do not disturb each other.
- What is found is checked (fingerprint, shapes); anything amiss counts as not cached and is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dtfcli.settings.data import DataSettings

FORMAT = 1
SPLITS = ("train", "validation")

_STAGING = ".building-"
_DAY = 24 * 60 * 60


def cache_folder(data: DataSettings) -> Path:
    """Where tokenized text is kept: `data.cache_dir`, or dtf/tokens in the user's cache folder."""
    if data.cache_dir:
        return Path(os.path.expanduser(data.cache_dir))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "dtf", "tokens")


def fingerprint_of(identity: dict[str, Any]) -> str:
    """32 hexadecimal digits for everything that decides a result, this code's version included."""
    content = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def load(folder: Path, fingerprint: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The blocks of both splits (int32 memory maps) and what was noted about them; None if not intact."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["fingerprint"] != fingerprint:
            return None
        blocks = {}
        for split in SPLITS:
            array = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
            if array.dtype != np.int32 or list(array.shape) != meta["shapes"][split]:
                return None
            blocks[split] = array
        return blocks, meta["notes"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def seal(folder: Path, fingerprint: str, blocks: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
    """Write meta.json, by which `load` checks the arrays that lie in the folder."""
    meta = {
        "fingerprint": fingerprint,
        "shapes": {split: list(array.shape) for split, array in blocks.items()},
        "notes": notes,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A new folder in the cache to build in; removed in the end unless it was published."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_STAGING}*"):  # of processes that were killed
        with suppress(OSError):  # another process may be removing it too
            if time.time() - leftover.stat().st_mtime > _DAY:
                _remove(leftover)
    folder = root / f"{_STAGING}{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        _remove(folder)


def publish(folder: Path, target: Path, fingerprint: str) -> None:
    """Give a complete folder its name, unless another process was faster; replaces a damaged one."""
    try:
        folder.rename(target)
    except OSError:
        if load(target, fingerprint) is not None:
            return
        # Moved aside first: removing in place would show others a folder that loses its files one by one.
        aside = folder.with_name(f"{_STAGING}{uuid.uuid4().hex}")
        target.rename(aside)
        _remove(aside)
        folder.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
