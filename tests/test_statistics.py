"""Standard error, interval and test of paired differences agree with scipy, the jackknife and the bootstrap."""

import numpy as np
import pytest
from scipy import stats

from dtfcli.statistics import TextLosses, jackknife_stderr, paired_difference


def test_a_mean_is_scipys() -> None:
    values = np.array([0.02, 0.031, 0.012, 0.027, 0.04])
    difference = paired_difference(values)
    assert difference.stderr == pytest.approx(stats.sem(values))
    assert difference.interval == pytest.approx(stats.t.interval(0.95, 4, values.mean(), stats.sem(values)))
    assert difference.p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert jackknife_stderr(lambda kept: values[kept].mean(), 5) == pytest.approx(difference.stderr)


def test_a_difference_per_token_has_the_error_of_the_jackknife_and_the_interval_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(50, 300, 400)
    control = rng.normal(4.0, 0.5, 400) * targets
    other = control - rng.normal(0.1, 0.3, 400) * targets
    difference = TextLosses(other, targets).minus(TextLosses(control, targets))
    d = other - control
    assert difference.value == pytest.approx(d.sum() / targets.sum())
    jackknife = jackknife_stderr(lambda kept: d[kept].sum() / targets[kept].sum(), 400)
    assert difference.stderr == pytest.approx(jackknife, rel=0.02)
    bootstrap = stats.bootstrap((d, targets), lambda d, n: d.sum() / n.sum(), paired=True, vectorized=False, rng=rng)
    assert difference.stderr is not None
    assert difference.interval == pytest.approx(tuple(bootstrap.confidence_interval), abs=difference.stderr / 5)


def test_what_has_no_error() -> None:
    single = paired_difference([2.0], [4])
    assert (single.value, single.stderr, single.interval, single.p) == (0.5, None, None, 1.0)
    assert paired_difference([0.1, 0.1, 0.1]).p == 0.0
    assert paired_difference([0.0, 0.0], [3, 5]).p == 1.0
    assert jackknife_stderr(lambda kept: 0.0, 2001) is None
