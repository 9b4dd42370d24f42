"""The lowest version of all that pyproject.toml asks for, as constraints for pip: what `make test-lowest` installs.

python -m tools.lowest > lowest.txt    # and then: pip install --constraint lowest.txt .

A constraint counts only for a package that is installed anyway, so the extras are all in it. torch is not: pip takes
the build that it took for .venv, because an older one is gigabytes of CUDA libraries where no CPU build of it is near.
"""

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^\]]*\])?>=(?P<version>[\w.]+)[^;]*(?P<marker>;.*)?")
EXCEPTED = ("torch",)


def constraints(pyproject: dict[str, Any]) -> list[str]:
    """A line `name==version` for each requirement, sorted; a requirement on the project's own extras has none.

    Raises:
        ValueError: a requirement has no lower bound, or two say different ones.
    """
    project = pyproject["project"]
    own = re.compile(rf"{re.escape(project['name'])}\[[^\]]*\]")
    found: dict[str, str] = {}
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        if own.fullmatch(requirement):
            continue
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"pyproject.toml: '{requirement}' has no lower bound; write NAME>=VERSION")
        name = match["name"].lower().replace("_", "-")
        line = f"{name}=={match['version']}{match['marker'] or ''}"
        if found.setdefault(name, line) != line:
            raise ValueError(f"pyproject.toml: {name} has two lower bounds, '{found[name]}' and '{line}'; write one")
    return [line for name, line in sorted(found.items()) if name not in EXCEPTED]


if __name__ == "__main__":
    lines = constraints(tomllib.loads(PYPROJECT.read_text(encoding="utf-8")))
    sys.stdout.write("\n".join(lines) + "\n")
