"""Points are compared with the control that is like them in the rest."""

import pytest

from dtfcli.errors import ConfigError
from dtfcli.studies.grid import Point
from dtfcli.studies.pairs import pair_up


def grid(architectures: str, capacities: str = "") -> list[Point]:
    points = []
    for name in architectures.split():
        for capacity in capacities.split() if name != "dense" and capacities else [""]:
            choices = {"model.architecture": name} | ({"model.capacity": capacity} if capacity else {})
            points.append(Point(" ".join(choices.values()), choices, ()))
    return points


def test_the_control_of_the_same_capacity() -> None:
    pairs = pair_up(grid("dtf random dense", ".25 .5"))
    assert pairs == [
        ("dtf .25", "random .25"),
        ("dtf .5", "random .5"),
        ("dense", "random .25"),
        ("dense", "random .5"),
    ]


def test_a_point_named_whole_is_compared_with_all() -> None:
    points = grid("dtf random", ".25 .5")
    assert pair_up(points, ["dtf .25"]) == [(point.name, "dtf .25") for point in points if point.name != "dtf .25"]


def test_two_controls_are_compared_with_each_other_once() -> None:
    pairs = pair_up(grid("dtf random layerdrop"), ["random", "layerdrop"])
    assert pairs == [("dtf", "random"), ("layerdrop", "random"), ("dtf", "layerdrop")]


@pytest.mark.parametrize(
    ("names", "control"), [("dtf mod dense", "dense"), ("dtf mod", "dtf"), ("mod random", "random")]
)
def test_the_default(names: str, control: str) -> None:
    assert {pair[1] for pair in pair_up(grid(names))} == {control}


def test_what_is_no_control_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a point of this study; choose from dtf"):
        pair_up(grid("dtf random", ".25 .5"), ["randm"])
    lonely = [*grid("dtf", ".5 .25"), *grid("random", ".25")]
    with pytest.raises(ConfigError, match="no control is like dtf"):
        pair_up(lonely, ["random"])


def test_without_a_control_like_it_a_point_is_compared_with_dense() -> None:
    lonely = [*grid("dtf", ".5 .25"), *grid("random", ".25"), *grid("dense")]
    assert pair_up(lonely) == [("dtf .25", "random .25"), ("dense", "random .25"), ("dtf .5", "dense")]
    found = pair_up(lonely[:3])
    assert found == [("dtf .25", "random .25"), ("dtf .25", "dtf .5"), ("random .25", "dtf .5")]
