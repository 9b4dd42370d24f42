"""What all tests share: no network, no settings from the caller's environment, and a way to run `dtf`."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: before any test file is
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; read when torch is imported, here or in a child
    os.environ["OMP_NUM_THREADS"] = "1"
if not Path("/dev/nvidiactl").exists():  # read when Triton's kernels are made: without a GPU its interpreter runs them
    os.environ["TRITON_INTERPRET"] = "1"

for _name in ("DTF_SHARED", "DTF_SMOLLM2"):  # where measuring data and a real checkpoint lie; settings have the prefix
    if _name in os.environ:
        os.environ[f"TESTS_{_name}"] = os.environ.pop(_name)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DTF_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of measuring data: DTF_SHARED, or ../shared beside the project."""
    folder = Path(os.environ.get("TESTS_DTF_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip("no measuring data: set DTF_SHARED to its folder")
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def dtf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `dtf` with these arguments in this process; returns exit code, stdout and stderr."""
    from dtfcli.cli import render
    from dtfcli.cli.app import main

    monkeypatch.setattr(render, "_LINE_EVERY_SECONDS", 3600.0)  # a slow machine prints no progress either

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["dtf", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), printed.out, printed.err)

    return run
