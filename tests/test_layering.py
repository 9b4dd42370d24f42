"""Who may import whom: read from the source, so that the house keeps its shape.

cli → workflows → what builds and reads → settings and models → errors. A new module has to be entered in `LEVELS`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dtfcli"

# A module may import from its own level and from those above it in this list.
LEVELS = [
    ["errors"],
    ["models", "overrides", "presets", "schema", "resolution", "settings", "registration"],
    [
        *("base_configs", "devices", "model_paths", "factory", "shares", "training.checkpoint", "training.adapters"),
        *("documents", "sources", "hub_source", "tokenization", "token_cache", "data"),
        *("targets", "conversations", "mixture", "stream"),
    ],
    [
        *("accounting", "scaling", "training", "generation", "inspection", "evaluation"),
        *("benchmark", "training_benchmark"),
        *("leaks", "eval_results", "model_card", "provenance", "upload", "hub_errors", "hub"),
    ],
    ["cli"],
]
LAZY = ("torch", "transformers", "datasets", "lm_eval")
LIGHT = ("cli", "settings", "presets", "errors", "overrides", "schema", "resolution", "registration")
TERMINAL = ("typer", "click", "rich", "prompt_toolkit")

FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
# The public API reaches everywhere, lazily, and __main__ starts the command line.
MODULES = sorted(name for name in FILES if name not in ("__init__", "__main__"))


def _imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Absolute names that a file imports; with everywhere=False those that run when it is imported."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "dtfcli.models" if node.level else ""
            name = ".".join(filter(None, [base, node.module]))
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif not everywhere and _runs_later(node):
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def _runs_later(node: ast.AST) -> bool:
    """Whether a statement's body does not run when its module is imported."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def _level(module: str) -> int:
    """The level of the longest entry that is the module or a package it lies in."""
    entries = {entry: level for level, names in enumerate(LEVELS) for entry in names}
    matches = [entry for entry in entries if module == entry or module.startswith(f"{entry}.")]
    assert matches, f"dtfcli/{module.replace('.', '/')}.py is new: enter it in LEVELS"
    return entries[max(matches, key=len)]


def _own(name: str) -> str | None:
    """The module of this package that an imported name belongs to."""
    parts = name.split(".")[1:] if name.startswith("dtfcli.") else []
    while parts and ".".join(parts) not in FILES:
        parts.pop()
    return ".".join(parts) or None


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    level = _level(module)
    assert [name for name in _imports(FILES[module]) if (own := _own(name)) and _level(own) > level] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("models.")])
def test_model_files_travel_alone(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    siblings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            assert node.module, "`from . import x` is not followed when the code is saved"
            assert "." not in node.module
            siblings.add(node.module)
    # Transformers finds siblings by this regular expression, in docstrings too.
    found = re.findall(r"^\s*from\s+\.(\S+)\s+import", FILES[module].read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(found) == siblings


@pytest.mark.parametrize("module", MODULES)
def test_the_terminal_is_the_command_lines_business(module: str) -> None:
    if not module.startswith("cli"):
        assert not [name for name in _imports(FILES[module]) if name.split(".")[0] in TERMINAL]


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] in LIGHT])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    names = list(_imports(FILES[module], everywhere=False))
    assert not [name for name in names if name.split(".")[0] in LAZY]
    # Nor through a module of ours that does.
    heavy = [own for name in names if (own := _own(name)) and not own.startswith(LIGHT)]
    assert heavy in ([], ["models.configuration_fields"] * len(heavy))
