"""The wheel is enough: what is in it, what it says of itself, and `dtf` from it in an empty folder."""

import json
import re
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, Built, Installed

pytestmark = pytest.mark.slow

TINY = (
    'data.sources=[{path="python-stdlib",ratio=0.02}]',
    "data.cache_dir=cache",
    "data.seq_len=64",
    "data.validation_blocks=2",
    "model.scratch.hidden_size=32",
    "model.scratch.intermediate_size=48",
    "model.scratch.num_hidden_layers=2",
    "model.scratch.vocab_size=400",
    "training.max_steps=2",
    "training.micro_batch_size=2",
    "training.tokens_per_update=256",
    "training.calibration_tokens=256",
)


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, and what is in them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def metadata(wheel: Path) -> Message:
    """What a wheel says of itself."""
    files = contents(wheel)
    return HeaderParser().parsestr(next(text for name, text in files.items() if name.endswith("/METADATA")).decode())


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    names = set(contents(built.wheel))
    package = {name for name in names if name.startswith("dtfcli/")}
    assert {name.split("/")[0] for name in names - package} == {f"{built.wheel.name.split('-py3')[0]}.dist-info"}
    beside = {f"dtfcli/presets/{path.name}" for path in (ROOT / "presets").glob("*.toml")}
    own = {path for path in (ROOT / "dtfcli").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert package == beside | {path.relative_to(ROOT).as_posix() for path in own}
    assert {"dtfcli/py.typed", "dtfcli/presets/quickstart.toml", "dtfcli/evaluation/tasks/humaneval.yaml"} <= package
    assert {f"dtfcli/inspection/page.{kind}" for kind in ("css", "html", "js")} <= package


def test_the_source_archive_builds_the_same_wheel(built: Built) -> None:
    assert contents(built.wheel) == contents(built.direct)
    with tarfile.open(built.sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"dtfcli", "presets", "docs", "tests", "tools", "LICENSE", "README.md", "CHANGELOG.md"} <= top
    assert not top & {".venv", ".cache", "outputs"}


def test_what_the_wheel_says_of_itself(built: Built) -> None:
    about = metadata(built.wheel)
    assert about["Name"] == "dtfcli"
    assert about["Requires-Python"] == ">=3.11"
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown"
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(about.get_all("Classifier", [])))
    assert versions == sorted(versions, key=lambda text: int(text.split(".")[1]))
    assert versions[0] == "3.11"
    assert "Typing :: Typed" in about.get_all("Classifier", [])
    files = contents(built.wheel)
    entry = next(text for name, text in files.items() if name.endswith("/entry_points.txt")).decode()
    assert entry.split() == ["[console_scripts]", "dtf", "=", "dtfcli.cli.app:main"]
    assert any(name.endswith("/licenses/LICENSE") for name in files)


def test_commands_answer_in_an_empty_folder(installed: Installed) -> None:
    where = "import dtfcli, dtfcli.settings.sources as p; print(dtfcli.__file__); print(p.presets_dir())"
    for line in installed.run(installed.python, "-c", where).stdout.splitlines():
        assert Path(line).resolve().is_relative_to(installed.packages.resolve())
    version = installed.run(installed.dtf, "--version").stdout
    assert re.fullmatch(r"dtf \d+\.\d+\.\d+\S*\n", version)
    listed = json.loads(installed.run(installed.dtf, "presets", "list", "--json").stdout)
    assert {preset["name"] for preset in listed} == {path.stem for path in (ROOT / "presets").glob("*.toml")}
    environment = json.loads(installed.run(installed.dtf, "env", "--json").stdout)
    assert environment["dtf"] == version.split()[1]


def test_the_quickstart_needs_no_repository(installed: Installed) -> None:
    dry = installed.run(installed.dtf, "train", "quickstart", "model=mod", "--dry-run", "--json")
    assert json.loads(dry.stdout)["settings"]["model"]["architecture"] == "mod"
    assert list(installed.folder.iterdir()) == []
    trained = installed.run(installed.dtf, "train", "quickstart", *TINY)
    model = installed.folder / trained.stdout.splitlines()[-1]
    assert (model / "model.safetensors").is_file()
    written = installed.run(installed.dtf, "generate", str(model), "def main(", "--max-new-tokens", "4")
    assert written.stdout.strip()
    assert {path.name for path in installed.folder.iterdir()} == {"cache", "outputs"}
