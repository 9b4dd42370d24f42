"""Who may import whom: `tools.house` holds the list and reads the imports; here they are compared."""

import ast
import re
import sys

import pytest

from tools import house

LAZY = ("torch", "transformers", "datasets", "lm_eval")
LIGHT = ("cli", "settings", "errors", "registration", "quiet")
FIXED = ("forward", "load_model")  # signatures that others fixed: Transformers, and our published API
TERMINAL = ("typer", "click", "rich", "prompt_toolkit")
VAGUE = ("found", "done", "asked", "what", "own")
MOST_VAGUE = 84
"""Variables and parameters of these names in dtfcli/. Lower it when you rename one; new ones say what they hold."""

FILES = sorted(house.FILES)
ARROWS = house.graph()


def test_every_room_has_its_level() -> None:
    assert house.unlisted() == []


def test_imports_come_from_the_left() -> None:
    assert {file: climbing for file in FILES if (climbing := house.climbing(file, ARROWS[file]))} == {}


def test_no_circle() -> None:
    assert house.circle(ARROWS) == []


def test_a_circle_and_a_climb_are_found() -> None:
    assert house.circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) != []
    assert house.climbing("training.loop", {"hub.push", "errors", "training.optim"}) == ["hub.push"]


def test_imports_inside_functions_count() -> None:
    assert "hub.push" in ARROWS["experiment"]
    names = list(house.imported_names(house.FILES["experiment"], lazy=False))
    assert not [name for name in names if house.own_file(name) == "hub.push"]


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("models.")])
def test_model_files_travel_alone(file: str) -> None:
    text = house.FILES[file].read_text(encoding="utf-8")
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    siblings = set()
    tree = ast.parse(text)
    # Transformers asks nobody for what is imported in a `try`: it may be missing.
    tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            assert names <= ({"triton"} if id(node) in tried else allowed)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            assert node.module, "`from . import x` is not followed when the code is saved"
            assert "." not in node.module
            siblings.add(node.module)
    # Transformers finds siblings by this regular expression, in docstrings too.
    assert set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)) == siblings


def imported(file: str, packages: tuple[str, ...], lazy: bool = True) -> list[str]:
    """What a file imports of these packages; `lazy`: inside functions, too."""
    names = house.imported_names(house.FILES[file], lazy=lazy)
    return [name for name in names if name.split(".")[0] in packages]


def test_the_terminal_belongs_to_the_command_line() -> None:
    others = [file for file in FILES if house.room(file) not in ("cli", "__main__")]
    assert {file: names for file in others if (names := imported(file, TERMINAL))} == {}


def test_light_files_import_nothing_heavy() -> None:
    light = [file for file in FILES if house.room(file) in LIGHT]
    assert {file: names for file in light if (names := imported(file, LAZY, lazy=False))} == {}
    # Nor through a file of ours that does.
    names = [name for file in light for name in house.imported_names(house.FILES[file], lazy=False)]
    others = {own for name in names if (own := house.own_file(name)) and house.room(own) not in (*LIGHT, "__init__")}
    assert others <= {"models.configuration_fields", "models.families"}


@pytest.mark.parametrize("room", sorted({house.room(file) for file in FILES}))
def test_a_file_has_one_purpose(room: str) -> None:
    for file in [file for file in FILES if house.room(file) == room]:
        text = house.FILES[file].read_text(encoding="utf-8")
        assert text.count("\n") <= 500, file
        nodes = ast.walk(ast.parse(text))
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        assert not [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60]
        if room != "cli":  # a command's options are its parameters
            assert not [f.name for f in functions if _parameters(f) > 7 and f.name not in FIXED and not _is_kernel(f)]


def test_new_variables_say_what_they_hold() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in house.FILES.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    assert sum(name in VAGUE for name in names) <= MOST_VAGUE


def _is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it: it takes pointers, sizes and strides one by one."""
    return any(isinstance(mark, ast.Name) and mark.id == "_jitted" for mark in function.decorator_list)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])
