"""Runs Python that a model wrote, in a process of its own with limited time, memory and disk, and without a network.

This keeps careless code from doing harm. It is not a security boundary. Where the user may create Linux namespaces, the
program gets a new network without interfaces. Otherwise the socket module is disabled, which only Python code respects.
`isolation()` names the method of this machine.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from typing import Literal

SECONDS = 5.0
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
PROCESSES = 64

Isolation = Literal["namespace", "sockets disabled"]

# Runs first in the child, and reads a secret word and the program from stdin. It writes the word only after the program
# has run to its end: leaving early, by exit or by os._exit, is not a success.
_GUARD = """
import os, sys
seconds, memory, file_bytes, processes = map(int, sys.argv[1:5])
word, program = sys.stdin.read().split("\\n", 1)
report = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
cut_off = False
if sys.platform == "linux":
    import ctypes
    NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
    cut_off = ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK) == 0
if not cut_off:
    import socket
    def refuse(*args, **kwargs):
        raise OSError("no network here")
    for module in (socket, sys.modules["_socket"]):
        for name in ("socket", "SocketType", "create_connection", "socketpair", "getaddrinfo"):
            if hasattr(module, name):
                setattr(module, name, refuse)
for name, value in (
    ("RLIMIT_CPU", seconds), ("RLIMIT_AS", memory), ("RLIMIT_FSIZE", file_bytes), ("RLIMIT_NPROC", processes),
    ("RLIMIT_CORE", 0),
):
    try:
        import resource
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    except (ImportError, AttributeError, ValueError, OSError):  # this system has no such limit
        pass
write, leave = os.write, os._exit
how = b" namespace" if cut_off else b" sockets disabled"
try:
    exec(compile(program, "candidate.py", "exec"), {"__name__": "__main__"})
except BaseException:
    leave(1)
write(report, word.encode() + how)
leave(0)
"""


def run(program: str, seconds: float = SECONDS) -> Isolation | None:
    """Run a program in a temporary folder to its end.

    Args:
        program: Python source.
        seconds: wall-clock time; processor time is limited to the next whole second.

    Returns:
        How it was kept off the network; None: it failed, left early or took too long.
    """
    word = secrets.token_hex(16)
    limits = [str(int(seconds) + 1), str(MEMORY_BYTES), str(FILE_BYTES), str(PROCESSES)]
    with tempfile.TemporaryDirectory(prefix="candidate-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-I", "-c", _GUARD, *limits]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        ) as child:
            try:
                printed, _ = child.communicate(f"{word}\n{program}".encode("utf-8", "replace"), timeout=seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(child)
    report = printed.decode("utf-8", "replace")
    if child.returncode != 0 or not report.startswith(word):
        return None
    return report.removeprefix(word).strip()  # type: ignore[return-value]  # the guard writes one of the two


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a program and all that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # Windows has no groups of processes
        child.kill()
    child.wait()


@cache
def isolation() -> Isolation | None:
    """How this machine keeps programs off the network; None if not even an empty program runs."""
    return run("pass", seconds=30.0)
