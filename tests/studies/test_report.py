"""Names of runs that exist, texts of an agreement, and FLOPs of a point."""

from pathlib import Path

import numpy as np
import pytest

from dtfcli.settings import load_settings
from dtfcli.studies.grid import Point
from dtfcli.studies.measure import Finished, Measured, point_of
from dtfcli.studies.report import make_report


def measured(seed: int, routed: bool, targets: int = 10, layers_flops: float = 2.0) -> Measured:
    rng = np.random.default_rng(seed)
    return Measured(
        nats=rng.normal(40, 2, 20).tolist(),
        targets=[targets] * 20,
        correct=[3] * 20,
        routed_share=0.5 if routed else None,
        flops=0.75 * layers_flops if routed else layers_flops,
        dense_flops=layers_flops,
        curve=[(0, 4.0)],
        share_curve=[],
        routed={1: rng.random(20 * targets) < 0.5} if routed else {},
    )


def finished(name: str, own: Measured) -> Finished:
    return Finished(Point(name, {}, ()), 1, Path(name), own)


def test_agreement_is_of_the_same_text_alone() -> None:
    runs = [finished("a", measured(1, True)), finished("b", measured(2, True)), finished("c", measured(3, True, 12))]
    found = make_report("t", runs, [("a", "b")]).agreement
    assert [(pair.first, pair.second) for pair in found] == [("a", "b")]
    assert found[0].kappa == pytest.approx(0, abs=0.2)


def test_flops_are_over_each_models_own_backbone() -> None:
    runs = [finished("small", measured(1, True)), finished("large", measured(2, True, layers_flops=8.0))]
    assert [row.flop_ratio for row in make_report("t", runs, [("small", "large")]).rows] == [0.75, 0.75]


def test_a_capacity_that_is_not_set_is_the_default() -> None:
    unset, explicit = (load_settings("quickstart", more) for more in ([], ["model.capacity=0.5"]))
    assert point_of(unset).name == point_of(explicit).name == "dtf 0.5"
    assert point_of(load_settings("quickstart", ["model=dense"])).name == "dense"
    assert point_of(load_settings("quickstart", ["model.capacity=[0.25,0.5,1]"])).name == "dtf 0.25,0.5,1"
