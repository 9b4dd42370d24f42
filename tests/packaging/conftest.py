"""The wheel, built from the tree, and an environment that holds the dependencies and, of dtfcli, the wheel alone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


def completed(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that has to succeed."""
    process = subprocess.run(command, text=True, capture_output=True, **options)
    assert process.returncode == 0, f"{command}: {process.stdout}\n{process.stderr}"
    return process


class Built(NamedTuple):
    """Made by `python -m build`: the source archive, the wheel made from it, and the wheel made from the tree."""

    sdist: Path
    wheel: Path
    direct: Path


class Installed(NamedTuple):
    """An environment with the wheel in it, and an empty folder to work in."""

    python: Path
    dtf: Path
    packages: Path
    folder: Path

    def run(self, *command: str | Path) -> str:
        """What a command prints in the empty folder, with nothing of ours in its environment."""
        ours = ("PYTHON", "DTF_", "VIRTUAL")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return completed(*command, cwd=self.folder, env=environment, encoding="utf-8").stdout


def _build(tree: Path, target: Path, *options: str) -> Path:
    completed(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, *options, tree)
    return target


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Archives of what git tracks, or would track: nothing that only lies around here can get in."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    both = _build(tree, folder / "both")
    alone = _build(tree, folder / "alone", "--wheel")
    return Built(next(both.glob("*.tar.gz")), next(both.glob("*.whl")), next(alone.glob("*.whl")))


@pytest.fixture(scope="session")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own.

    The dependencies are those of the running environment, named in a .pth file: Python adds the folder and does not
    read the .pth files in it, so that an editable dtfcli there stays out.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(symlinks=os.name != "nt").create(home)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(home), "platbase": str(home)}))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    completed(*pip, built.wheel)
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in sorted(folders)), encoding="utf-8")
    folder = tmp_path_factory.mktemp("empty")
    return Installed(python, scripts / ("dtf.exe" if os.name == "nt" else "dtf"), packages, folder)
