"""Planted differences are found, planted nulls are not called differences; what cannot be paired is refused."""

import gc

import numpy as np
import pytest

from dtfcli.errors import ConfigError
from dtfcli.statistics import TextLosses as Losses
from dtfcli.studies.differences import differences

PAIRS = [("other", "control")]


def study(rng: np.random.Generator, effect: float, seeds: int, documents: int = 120) -> dict[str, dict[int, Losses]]:
    """Two points with common documents: a document's difference scatters by 0.2, a seed's by 0.006."""
    losses: dict[str, dict[int, Losses]] = {"control": {}, "other": {}}
    for seed in range(seeds):
        targets = rng.integers(20, 200, documents)
        own = rng.normal(4.5, 0.6, documents)
        shift = effect + rng.normal(0, 0.006) + rng.normal(0, 0.2, documents)
        losses["control"][seed] = Losses(own * targets, targets)
        losses["other"][seed] = Losses((own + shift) * targets, targets)
    return losses


def test_the_interval_by_document_covers_the_ratio() -> None:
    (found,) = differences(study(np.random.default_rng(0), 0.05, 5), PAIRS)
    low, high = found.by_document
    assert low < found.value < high
    assert (found.seeds, found.documents) == (5, 600)
    # Close to the normal approximation of a weighted mean of 600 documents.
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / np.sqrt(600) * 1.15, rel=0.25)


@pytest.mark.parametrize("seeds", [2, 5])
def test_planted_differences_and_nulls(seeds: int, request: pytest.FixtureRequest) -> None:
    found = dict.fromkeys((0.0, 0.05), 0)
    request.addfinalizer(gc.unfreeze)
    gc.freeze()  # statsmodels collects garbage in each call: 0.3 s in a process full of other tests' objects
    for effect in found:
        for number in range(100):
            losses = study(np.random.default_rng([seeds, number, int(effect > 0)]), effect, seeds, 250)
            found[effect] += differences(losses, PAIRS)[0].is_found
    assert found[0.05] >= 95
    assert found[0.0] <= 7


def test_holm_is_applied_to_all_together() -> None:
    rng = np.random.default_rng(1)
    losses = study(rng, 0.05, 3)
    for number in range(3):
        losses[f"null {number}"] = {
            seed: Losses(control.nats + rng.normal(0, 5, len(control.targets)), control.targets)
            for seed, control in losses["control"].items()
        }
    all_four = differences(losses, [(name, "control") for name in losses if name != "control"])
    assert [d.name for d in all_four] == ["other", "null 0", "null 1", "null 2"]
    assert all(d.p_holm >= d.p for d in all_four)
    smallest = min(all_four, key=lambda d: d.p)
    assert smallest.p_holm == pytest.approx(min(1.0, 4 * smallest.p))


def test_what_cannot_be_paired_is_refused() -> None:
    losses = study(np.random.default_rng(2), 0.05, 2)
    with pytest.raises(ConfigError, match="no seed in common"):
        differences({"control": losses["control"], "other": {9: losses["other"][0]}}, PAIRS)
    shorter = Losses(losses["other"][0].nats[1:], losses["other"][0].targets[1:])
    with pytest.raises(ConfigError, match="other held-out documents"):
        differences({"control": losses["control"], "other": {0: shorter}}, PAIRS)
    one = {0: Losses(np.array([40.0]), np.array([10]))}
    with pytest.raises(ConfigError, match="a single held-out document has no interval"):
        differences({"control": one, "other": one}, PAIRS)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_points_that_are_the_same_function_do_not_differ(seeds: int) -> None:
    losses = study(np.random.default_rng(4), 0.05, seeds)
    (found,) = differences({"control": losses["control"], "other": losses["control"]}, PAIRS)
    assert (found.value, found.p, found.is_found) == (0.0, 1.0, False)


def test_a_sentence_says_what_follows_with_its_error() -> None:
    (found,) = differences(study(np.random.default_rng(3), 0.08, 3), PAIRS)
    assert found.sentence.startswith(f"other − control: {found.value:+.3f} ± ")
    assert found.sentence.endswith("(3 seeds): worse")
