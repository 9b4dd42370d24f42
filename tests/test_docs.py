"""The documentation names files and functions that exist, and every contract test stands among the promises."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OLD = "history.md"  # tells of files that are gone


CURRENT = pytest.mark.parametrize("page", [page for page in PAGES if page.name != OLD], ids=lambda page: page.name)


@CURRENT
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:dtfcli|tests|tools|presets|docs)/[\w/.-]*\w)`", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    missing += [name for name in linked if not (page.parent / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_functions_are_in_the_named_files(page: str) -> None:
    assert list(stale_names((ROOT / page).read_text(encoding="utf-8"))) == []


def test_stale_names_are_reported() -> None:
    row = "| scores | `mod_scores`, `old_scores` and `Router.gone` in `dtfcli/models/routing.py`; twins in `gone.py` |"
    assert list(stale_names(row)) == ["gone.py", "old_scores in routing.py", "Router.gone in routing.py"]
    step = "1. `dtfcli/errors.py`: a subclass of `DTFError`, and its name\n   in `OLD_ERRORS`."
    assert list(stale_names(step)) == ["OLD_ERRORS in errors.py"]


PYTHON = r"`([\w/]+\.py)`"
PAIRS = re.compile(r"((?:`[\w.]+`(?:,\s|\sand\s)?)+)\sin\s" + PYTHON)


def stale_names(text: str) -> Iterator[str]:
    """What a page says of our files that is not so.

    - Each `file.py` exists.
    - "`name` and `other` in `file.py`": the file defines both.
    - "1. `file.py`: text" in a list of steps: each constant or class in backticks stands in the file.
    """
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("[dt]*/**/*.py")]
    contents = {
        name: "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files if f"/{file}".endswith(f"/{name}"))
        for name in re.findall(PYTHON, text)
    }
    yield from (name for name, content in contents.items() if not content and "NAME" not in name)
    for names, name in PAIRS.findall(text):
        defined = set(definitions(ast.parse(contents[name])))
        yield from (f"{word} in {Path(name).name}" for word in names.split("`")[1::2] if word not in defined)
    for step in re.findall(r"^\d+\. (`.*(?:\n   .*)*)", text, re.MULTILINE):
        _, *parts = re.split(PYTHON, PAIRS.sub("", step))
        for name, explanation in zip(parts[::2], parts[1::2], strict=True):
            present = set(re.findall(r"\w+", contents[name]))
            classes = re.findall(r"`(_?[A-Z]\w+)`", explanation) if present else []
            yield from (f"{word} in {Path(name).name}" for word in classes if word not in present)


def definitions(tree: ast.Module | ast.ClassDef, before: str = "") -> Iterator[str]:
    """Functions, classes and variables of a file, those of classes as `Class.name`."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield before + node.name
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{node.name}.")
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (before + target.id for target in targets if isinstance(target, ast.Name))


def test_every_contract_test_holds_a_promise() -> None:
    promises = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    tests = [f"tests/contract/{file.name}" for file in (ROOT / "tests" / "contract").glob("test_*.py")]
    assert [name for name in tests if name not in promises] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [file.name for file in (ROOT / "docs").glob("*.md") if file.name != "index.md"]
    assert [name for name in pages if f"({name})" not in index] == []
