"""`--num-processes N`: N copies of a command on this machine, one for each device, that train one model together.

torch starts them, and each runs `python -m dtfcli`. This file decides how they end. Ctrl-C and SIGTERM reach each
process once, so that it can save; torchrun would send a second signal, which means "stop at once". When one process
fails, the others get a little time and are stopped. The output of a process other than the first is shown if it was
the first to fail. `accelerate launch -m dtfcli train …` does the same across machines.
"""

import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_GRACE_SECONDS = 20.0
"""How long the others may go on after a process has failed: to save, or to notice it themselves."""


def launch(arguments: list[str], processes: int) -> int:
    """Run `dtf ARGUMENTS` in several processes; returns the exit code of the first that failed, or 0."""
    from torch.multiprocessing import start_processes

    from dtfcli.training.interrupt import STOP_SIGNALS

    with tempfile.TemporaryDirectory(prefix="dtf-") as folder:
        context: Any = start_processes(
            _work, (arguments, processes, _free_port(), folder), nprocs=processes, join=False, start_method="spawn"
        )
        workers = context.processes
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in previous:
            signal.signal(number, lambda number, frame: _pass_on(workers, number))
        try:
            first = _wait_for(workers)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 0 if first is None else _report(first, workers[first].exitcode, Path(folder))


def _work(rank: int, arguments: list[str], processes: int, port: int, folder: str) -> None:
    """One of the processes. Its own group, so that the terminal's Ctrl-C comes once, through the launching one."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update(
        {name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if rank:
        output = os.open(Path(folder) / f"{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
    sys.argv = ["dtf", *arguments]
    code: Any = 0
    try:
        runpy.run_module("dtfcli", run_name="__main__")
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # threads of a broken connection would keep the interpreter from ending


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _pass_on(workers: list[Any], number: int) -> None:
    for worker in workers:
        if worker.is_alive():
            os.kill(worker.pid, number)


def _wait_for(workers: list[Any]) -> int | None:
    """Wait until all have ended; returns the first that failed. Those that outlive it too long are killed."""
    first, failed_at = None, 0.0
    while alive := [worker for worker in workers if worker.is_alive()]:
        wait([worker.sentinel for worker in alive], timeout=1.0)
        if first is None:
            first = _first_failed(workers)
            failed_at = time.monotonic()
        elif time.monotonic() - failed_at > _GRACE_SECONDS:
            for worker in alive:
                worker.kill()
    return _first_failed(workers) if first is None else first


def _first_failed(workers: list[Any]) -> int | None:
    """The lowest rank that failed; one ended by a signal before the others, which ended because they lost it."""
    failed = [(worker.exitcode > 0, rank) for rank, worker in enumerate(workers) if worker.exitcode]
    return min(failed)[1] if failed else None


def _report(rank: int, code: int, folder: Path) -> int:
    """Show why a process failed, if the terminal has not, and return the exit code of the whole."""
    from dtfcli.cli import render

    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the system does that when memory runs out" if name == "SIGKILL" else ""
        render.fail(f"process {rank} was ended by {name}{hint}. Go on with: dtf train --resume")
        return 1
    if rank and code != 130:
        said = (folder / f"{rank}.txt").read_text(encoding="utf-8", errors="replace").strip()
        render.err.print(f"Process {rank} said:\n{said}", markup=False, soft_wrap=True)
    return code
