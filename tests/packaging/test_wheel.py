"""The wheel is enough: what is in it, what it says of itself, and `dtf` from it in an empty folder."""

import json
import re
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, Built, Installed

pytestmark = pytest.mark.slow

TINY = [
    'data.sources=[{path="python-stdlib",ratio=0.02}]',
    *("data.cache_dir=cache", "data.seq_len=64", "data.validation_blocks=2"),
    *("model.scratch.hidden_size=32", "model.scratch.intermediate_size=48", "model.scratch.num_hidden_layers=2"),
    *("model.scratch.vocab_size=400", "training.max_steps=2", "training.micro_batch_size=2"),
    *("training.tokens_per_update=256", "training.calibration_tokens=256"),
]


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, and what is in them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    names = set(contents(built.wheel))
    package = {name for name in names if name.startswith("dtfcli/")}
    assert {name.split("/")[0] for name in names - package} == {f"{built.wheel.name.split('-py3')[0]}.dist-info"}
    beside = {f"dtfcli/presets/{path.name}" for path in (ROOT / "presets").glob("*.toml")}
    own = {path for path in (ROOT / "dtfcli").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert package == beside | {path.relative_to(ROOT).as_posix() for path in own}
    assert {"dtfcli/py.typed", "dtfcli/presets/quickstart.toml", "dtfcli/evaluation/tasks/humaneval.yaml"} <= package
    assert {f"dtfcli/inspection/page.{kind}" for kind in ("css", "html", "js")} | {"dtfcli/demo/page.css"} <= package


def test_the_source_archive_builds_the_same_wheel(built: Built) -> None:
    assert contents(built.wheel) == contents(built.direct)
    with tarfile.open(built.sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"dtfcli", "presets", "docs", "tests", "tools", "LICENSE", "README.md", "CHANGELOG.md"} <= top
    assert not top & {".venv", ".cache", "outputs"}


def test_the_wheel_describes_itself(built: Built) -> None:
    files = {
        name.partition("/")[2]: text.decode() for name, text in contents(built.wheel).items() if ".dist-info/" in name
    }
    about = HeaderParser().parsestr(files["METADATA"])
    assert (about["Name"], about["Requires-Python"], about["License-Expression"]) == ("dtfcli", ">=3.11", "Apache-2.0")
    assert about["Description-Content-Type"] == "text/markdown"
    classifiers = about.get_all("Classifier", [])
    versions = [int(number) for number in re.findall(r"Python :: 3\.(\d+)", " ".join(classifiers))]
    assert versions == sorted(versions)
    assert versions[0] == 11
    assert "Typing :: Typed" in classifiers
    assert files["entry_points.txt"].split() == ["[console_scripts]", "dtf", "=", "dtfcli.cli.app:main"]
    assert "licenses/LICENSE" in files


def test_commands_answer_in_an_empty_folder(installed: Installed) -> None:
    where = "import dtfcli, dtfcli.settings.sources as p; print(dtfcli.__file__); print(p.presets_dir())"
    for line in installed.run(installed.python, "-c", where).splitlines():
        assert Path(line).resolve().is_relative_to(installed.packages.resolve())
    listed = json.loads(installed.run(installed.dtf, "presets", "list", "--json"))
    assert {preset["name"] for preset in listed} == {path.stem for path in (ROOT / "presets").glob("*.toml")}
    environment = json.loads(installed.run(installed.dtf, "env", "--json"))
    assert installed.run(installed.dtf, "--version") == f"dtf {environment['dtf']}\n"


def test_the_quickstart_needs_no_repository(installed: Installed) -> None:
    trained = installed.run(installed.dtf, "train", "quickstart", *TINY)
    model = installed.folder / trained.splitlines()[-1]
    assert (model / "model.safetensors").is_file()
    assert installed.run(installed.dtf, "generate", str(model), "def main(", "--max-new-tokens", "4").strip()
    assert {path.name for path in installed.folder.iterdir()} == {"cache", "outputs"}
