"""Every reader meets damaged files: it reads them, or says in words which file and what to do.

A case takes a healthy folder and damages one file of it. Each case may take a limited amount of memory.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dtfcli.errors import DTFError
from tests.budget import examples
from tests.strangers.damage import fresh_copy
from tests.strangers.readers import READERS, Reader

CASES, MANY = 6, 60
"""For each of the readers: 198 in all in `make test-all`, and 1,980 of the tests marked `long`."""
_ROOM = 3 * 2**29
_NUMBERS = itertools.count()
QUIET: dict[str, Any] = {
    "database": None,
    "phases": [Phase.generate],  # a case names its damage, and takes too long to look for a smaller one
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}


@contextmanager
def bounded_memory(room: int = _ROOM) -> Iterator[None]:
    """Let this process take only so many bytes more; beyond that, memory cannot be had."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of everything in a folder."""
    stats = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def check(reader: Reader, rng: Random, healthy: Path, scratch: Path) -> None:
    """One case."""
    folder = fresh_copy(healthy / reader.folder, scratch / f"case{next(_NUMBERS)}" / "it")
    damage = reader.damage(rng, folder / reader.file)
    before = states(folder.parent)
    answer: Any = None
    with bounded_memory():
        try:
            answer = reader.read(folder)
        except DTFError as error:
            said = str(error)
            assert str(folder) in said, (damage, said)
            assert len(said.splitlines()) <= 4, (damage, said)
            assert said.rstrip().endswith((".", "?", "…")), (damage, said)
            assert "allocate" not in said, (damage, said)
            assert "SECRET" not in said, (damage, said)
    assert states(folder.parent) == before, damage
    assert reader.named or "SECRET" not in str(answer), damage
    if isinstance(answer, torch.Tensor):
        assert answer.shape[:2] == (1, 8), damage


@pytest.mark.parametrize("count", [examples(CASES), pytest.param(MANY, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", READERS)
def test_read_or_explained(name: str, count: int, healthy: Path, tmp_path: Path) -> None:
    @settings(max_examples=count, derandomize=count < MANY, **QUIET)
    @given(seed=st.integers(0, 2**32))
    def cases(seed: int) -> None:
        check(READERS[name], Random(seed), healthy, tmp_path)

    cases()


@pytest.mark.parametrize("name", READERS)
def test_healthy_files_are_read(name: str, healthy: Path, tmp_path: Path) -> None:
    folder = fresh_copy(healthy / READERS[name].folder, tmp_path / "it")
    with bounded_memory():
        assert READERS[name].read(folder) is not None
