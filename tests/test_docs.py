"""The pages name files, functions, settings and options that exist; one page alone speaks of the thesis's score.

`docs/cli.md` and `docs/settings.md` are generated from the code (`python -m tools.reference --check`), so the other
pages are compared with them.
"""

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
CURRENT = [page for page in PAGES if page.name != "history.md"]  # the history names files and settings that are gone
WRITTEN = [page for page in CURRENT if page.name not in ("cli.md", "settings.md")]
SETTINGS = set(re.findall(r"^\| `([\w.\[\]]+)` \|", (DOCS / "settings.md").read_text(encoding="utf-8"), re.M))
GROUPS = {key.split(".")[0] for key in SETTINGS if "." in key}
OPTIONS = {
    section.split("\n", 1)[0]: {"--help", "--debug"} | set(re.findall(r"--[\w-]+", section))
    for section in re.split(r"^#+ (?=dtf)", (DOCS / "cli.md").read_text(encoding="utf-8"), flags=re.M)[1:]
}


def blocks(text: str, *kinds: str) -> list[str]:
    """The fenced blocks of these kinds."""
    return [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if kind in kinds]


@pytest.fixture(params=WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:dtfcli|tests|tools|presets|docs)/[\w/.-]*\w)`", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    missing += [name for name in linked if not (page.parent / name).exists()]
    assert missing == []


def test_linked_headings_exist(page: Path, text: str) -> None:
    missing = []
    for name, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)#([^)\s]+)\)", text):
        target = (page.parent / name if name else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", target, re.M)
        anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        missing += [f"{name}#{anchor}"] if anchor not in anchors else []
    assert missing == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_functions_are_in_the_named_files(page: str) -> None:
    assert list(stale_names((ROOT / page).read_text(encoding="utf-8"))) == []


def test_stale_names_are_reported() -> None:
    row = "| scores | `select_topk`, `old_scores` and `Router.gone` in `dtfcli/models/routing.py`; twins in `gone.py` |"
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


def test_named_settings_exist(text: str) -> None:
    code = chain(blocks(text, "", "bash", "console"), re.findall(r"`([^`\n]+)`", text))
    keys = {key for part in code for key in re.findall(r"(?<![\w./-])(\w+\.[a-z_.]+)(?==)", part)}
    known = SETTINGS | {"model"}
    assert [key for key in sorted(keys) if key.split(".")[0] in GROUPS and key not in known] == []


def test_commands_have_the_options_that_the_page_gives_them(text: str) -> None:
    unknown = []
    for block in blocks(text, "", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.match(r"(?:\$ |\S*bin/)?dtf ([a-z-]+)(?: ([a-z]+)(?= |$))?(.*)", line)
            if command is None:
                continue
            name = next((n for n in (f"dtf {command[1]} {command[2]}", f"dtf {command[1]}") if n in OPTIONS), None)
            given = re.findall(r"(?<!\S)--[\w-]+", command[3].split(" # ")[0])
            unknown += [line] if name is None else [option for option in given if option not in OPTIONS[name]]
    assert unknown == []


def test_python_blocks_compile(page: Path, text: str) -> None:
    for block in blocks(text, "python"):
        compile(block, page.name, "exec")


def test_only_the_thesis_page_has_the_quantities_of_surprise(page: Path, text: str) -> None:
    if page.name != "thesis.md":
        assert re.findall(r"\b(?:D_st|D_ch|S_CE|S_CU|by CE|rank CE|β_ce|β_cu)\b", text) == []


def test_every_contract_test_holds_a_promise() -> None:
    promises = (DOCS / "promises.md").read_text(encoding="utf-8")
    tests = [f"tests/contract/{file.name}" for file in (ROOT / "tests" / "contract").glob("test_*.py")]
    assert [name for name in tests if name not in promises] == []


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = [file.name for file in DOCS.glob("*.md") if file.name != "index.md"]
    assert [name for name in pages if f"({name})" not in index] == []
