"""`dtf` in processes that end badly: each is forked, in milliseconds, from one that has everything loaded.

They are real: signals kill them, and limits of the system stop their writes. A *fault* is a function that such a
process calls before the command; it arranges what goes wrong, and where.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.cli.app import main
from dtfcli.training import loop
from dtfcli.training.run import Run
from tests.conftest import Outcome

if not hasattr(os, "fork"):
    pytest.skip("processes are forked", allow_module_level=True)

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.faults", "dtfcli.experiment", "dtfcli.conversion.convert", "dtfcli.data.prepare"])


class Dtf:
    """`dtf ARGUMENTS` in a process, which has begun; what it prints goes to files in `folder`."""

    def __init__(self, folder: Path, *arguments: str | Path, fault: Callable[[], None] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / "stdout.txt", folder / "stderr.txt"]
        work = (self.files, [str(argument) for argument in arguments], fault)
        self.process = _FORKS.Process(target=_work, args=work)
        self.process.start()

    def ends(self, kill_after: float = 120.0, number: int = signal.SIGKILL) -> Outcome:
        """Wait for its end, and send it a signal after some seconds; the code of a killed one is below 0."""
        self.process.join(kill_after)
        if self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, number)
            self.process.join()
        code = self.process.exitcode
        assert code is not None
        return Outcome(code, *(file.read_text("utf-8") if file.exists() else "" for file in self.files))

    def says(self, words: str) -> None:
        """Wait until it has printed some words."""
        while words not in (self.files[1].read_text("utf-8") if self.files[1].exists() else ""):
            assert self.process.is_alive(), self.ends()
            time.sleep(0.01)


def _work(files: list[Path], arguments: list[str], fault: Callable[[], None] | None) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), descriptor)
    torch.set_num_threads(1)
    if fault is not None:
        fault()
    sys.argv = ["dtf", *arguments]
    main()


def at_step(number: int, happen: Callable[[Run], Any]) -> None:
    """A fault after `number` steps of training."""
    step = loop.train_step

    def disturbed(run: Run) -> dict[str, Any]:
        if run.state.step == number:
            happen(run)
        return step(run)

    loop.train_step = disturbed


def fill_the_disk(run: Run) -> None:
    """No file grows beyond 32 KiB from here on: the weights of a small run do, its metrics do not."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def use_up_the_memory(run: Run) -> None:
    """Ask the allocator for more than any machine has."""
    torch.empty(2**50)


def remove_the_folder(run: Run) -> None:
    shutil.rmtree(run.folder)


def hang(run: Run) -> None:
    os.write(2, b"It hangs.\n")
    time.sleep(60.0)


def interrupt(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill_at_file(number: int, folder: Path, count: Any) -> None:
    """SIGKILL before the operation of this number on a file or folder in `folder`; `count.value` counts them."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(arguments[0]):
            count.value += 1
            if count.value == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def counter() -> Any:
    """A number that a process shares with this one."""
    return _FORKS.RawValue("i", 0)
