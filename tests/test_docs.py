"""The documentation names files that exist, and every contract test stands among the promises."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OLD = "history.md"  # tells of files that are gone


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != OLD], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:dtfcli|tests|tools|presets|docs)/[\w/.-]*\w)`", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    missing += [name for name in linked if not (page.parent / name).exists()]
    assert missing == []


def test_every_contract_test_holds_a_promise() -> None:
    promises = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    tests = [f"tests/contract/{file.name}" for file in (ROOT / "tests" / "contract").glob("test_*.py")]
    assert [name for name in tests if name not in promises] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [file.name for file in (ROOT / "docs").glob("*.md") if file.name != "index.md"]
    assert [name for name in pages if f"({name})" not in index] == []
