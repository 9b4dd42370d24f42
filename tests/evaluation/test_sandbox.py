"""Code that a model wrote gets little time, memory and disk, no network, and counts only when it runs to its end."""

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from dtfcli.evaluation import sandbox
from dtfcli.evaluation.passk import humaneval_results, mbpp_results

posix = pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX's")


def test_what_runs_to_its_end_has_passed() -> None:
    assert sandbox.run("assert sum(range(10)) == 45")
    assert sandbox.isolation() in ("namespace", "sockets disabled")


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "this is not Python",
        "raise KeyboardInterrupt",
        "\ud800",
    ],
)
def test_what_does_not_has_not(program: str) -> None:
    assert not sandbox.run(program)


def test_time_is_limited() -> None:
    started = time.monotonic()
    assert not sandbox.run("import time; time.sleep(60)", seconds=0.5)
    assert time.monotonic() - started < 5


@posix
def test_memory_and_files_are_limited(tmp_path: Path) -> None:
    assert not sandbox.run("bytearray(2 << 30)")
    assert not sandbox.run("open('big', 'wb').write(bytes(2 << 20))")
    assert sandbox.run("open('small', 'wb').write(bytes(1000))")


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached = threading.Event()

        def accept() -> None:
            try:
                server.accept()
                reached.set()
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert not sandbox.run(program)
        assert not reached.is_set()


def test_the_network_is_gone_without_namespaces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_GUARD", sandbox._GUARD.replace('sys.platform == "linux"', "False"))
    assert sandbox.run("pass") == "sockets disabled"
    assert not sandbox.run("import socket; socket.socket()")
    assert not sandbox.run("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')")


@posix
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    child = f"import time, pathlib; time.sleep(1); pathlib.Path({str(marker)!r}).touch()"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    assert sandbox.run(program)
    time.sleep(1.5)
    assert not marker.exists()


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert sandbox.run("import os; assert 'HF_TOKEN' not in os.environ")
    assert sandbox.run("import os; assert os.listdir() == []")


def test_problems_are_judged_by_their_tests() -> None:
    problem = {"test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "double"}
    right, wrong = "def double(x):\n    return 2 * x\n", "def double(x):\n    return x\n"
    assert humaneval_results(problem, [[right, wrong]]) == {"pass@1": 0.5}
    assert mbpp_results({"test_list": ["assert double(3) == 6"]}, [[right]]) == {"pass@1": 1.0}


def test_the_known_solutions_pass(shared_dir: Path) -> None:
    from pyarrow.parquet import read_table

    file = shared_dir / "data" / "benchmarks" / "openai" / "openai_humaneval" / "test.parquet"
    for problem in read_table(file).to_pylist()[::16]:
        program = problem["prompt"] + problem["canonical_solution"]
        assert humaneval_results(problem, [[program]]) == {"pass@1": 1.0}
        assert humaneval_results(problem, [[problem["prompt"] + "    return None\n"]]) == {"pass@1": 0.0}
