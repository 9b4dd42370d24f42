"""Who may import whom: one ordered list, for the tests, for `make check` and for the table in docs/architecture.md.

python -m tools.house            # write the table
python -m tools.house --check    # exit 1: an import that climbs, a circle, or a table that is not current
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dtfcli"
PAGE = ROOT / "docs" / "architecture.md"
MARKS = ("<!-- house: made by `python -m tools.house` -->", "<!-- /house -->")

LEVELS = [
    level.split()
    for level in (
        "errors models quiet",
        "registration settings shares statistics",
        "data generation runs",
        "loading inspection serving",
        "cost",
        "training demo",
        "evaluation bench",
        "hub conversion",
        "experiment",
        "studies",
        "__init__",
        "cli",
        "__main__",
    )
]
"""Packages and files of dtfcli/. Each imports from the levels before its own, and a package from itself."""

FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
FILES = {(name if name == "__init__" else name.removesuffix(".__init__")): path for name, path in FILES.items()}


def imported_names(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Absolute dotted names that a file imports; with lazy=False only those that it imports when it is imported."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "dtfcli." + path.parent.relative_to(PACKAGE).as_posix().replace("/", ".") if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif not lazy and _runs_later(node):
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def _runs_later(node: ast.AST) -> bool:
    """Whether a statement's body does not run when its module is imported."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def own_file(name: str) -> str | None:
    """The file of dtfcli/ that an imported name lives in, as a dotted name; None for other packages."""
    parts = name.split(".")
    if parts[0] != "dtfcli":
        return None
    while len(parts) > 1 and ".".join(parts[1:]) not in FILES:
        parts.pop()
    return ".".join(parts[1:]) or "__init__"


def room(file: str) -> str:
    """The package or file at the root of dtfcli/ that a file belongs to."""
    return file.split(".")[0]


def graph() -> dict[str, set[str]]:
    """Each file of dtfcli/ and the files it imports, function-level imports included."""
    return {
        file: {own for name in imported_names(path) if (own := own_file(name)) is not None and own != file}
        for file, path in FILES.items()
    }


def unlisted() -> list[str]:
    """Rooms that have no level, and entries of LEVELS that have no room."""
    listed = {name for names in LEVELS for name in names}
    return sorted(listed ^ {room(file) for file in FILES})


def climbing(file: str, imported: set[str]) -> list[str]:
    """What a file imports from a level that is not before its own."""
    level = {name: place for place, names in enumerate(LEVELS) for name in names}
    return sorted(other for other in imported if room(other) != room(file) and level[room(other)] >= level[room(file)])


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Files that import one another in a circle; empty where there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def problems() -> list[str]:
    """What is wrong with the imports, a line for each."""
    if missing := unlisted():
        return [f"LEVELS and dtfcli/ differ in {', '.join(missing)}"]
    arrows = graph()
    found = [
        f"{file} imports {other}, which is not to its left"
        for file, imported in sorted(arrows.items())
        for other in climbing(file, imported)
    ]
    return found + ([f"circle: {' → '.join(files)}"] if (files := circle(arrows)) else [])


def table() -> str:
    """The rooms from left to right, each with the first sentence of its docstring."""
    lines = ["| level | room | purpose |", "|---|---|---|"]
    for number, names in enumerate(LEVELS, 1):
        for name in names:
            path = FILES[name]
            place = f"{name}/" if path.parent != PACKAGE else path.name
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = " ".join(docstring.split("\n\n")[0].split()).rstrip(".")
            lines.append(f"| {number} | `{place}` | {first} |")
    return "\n".join(lines)


def _with_table(page: str) -> str:
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{after}"


def main(check: bool) -> None:
    """Write the table, or look whether everything is as the list says."""
    page = PAGE.read_text(encoding="utf-8")
    found = problems()
    if not check:
        PAGE.write_text(_with_table(page), encoding="utf-8")
    elif page != _with_table(page):
        found.append("docs/architecture.md is not current: run python -m tools.house")
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main(check=sys.argv[1:] == ["--check"])
