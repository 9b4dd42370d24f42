"""`tools.lowest`: the lower bounds of pyproject.toml as pip's constraints."""

import tomllib

import pytest

from tools.lowest import PYPROJECT, constraints


def project(*dependencies: str, **extras: list[str]) -> dict[str, object]:
    """What tomllib reads from a pyproject.toml with these requirements."""
    return {"project": {"name": "ours", "dependencies": list(dependencies), "optional-dependencies": extras}}


def test_bounds_become_pins() -> None:
    extras = {"all": ["ours[more]", "a>=3,<4; sys_platform == 'linux'"], "more": ["b-b>=1.2"]}
    bounds = project("torch>=2.11,<2.14", "B_b[hf]>=1.2", **extras)
    assert constraints(bounds) == ["a==3; sys_platform == 'linux'", "b-b==1.2"]


@pytest.mark.parametrize(
    ("requirements", "reason"), [(["a"], "no lower bound"), (["a>=1", "a>=2"], "two lower bounds")]
)
def test_a_bound_that_says_nothing_is_named(requirements: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=f"a.*{reason}"):
        constraints(project(*requirements))


def test_every_requirement_of_the_project_has_one() -> None:
    lines = constraints(tomllib.loads(PYPROJECT.read_text(encoding="utf-8")))
    assert any(line.startswith("transformers==") for line in lines)
    assert not any(line.startswith(("torch==", "dtfcli")) for line in lines)
