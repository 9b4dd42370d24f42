"""Paired differences over the same texts or items: one standard error and one test.

A difference is a ratio of sums, r = Σ dᵢ / Σ nᵢ, of the differences dᵢ of texts and their weights nᵢ: the tokens of a
text, or 1 for an item of a benchmark, where r is a mean. Its standard error is √(N/(N−1) · Σ (dᵢ − r nᵢ)²) / Σ nᵢ, by
linearization, which for equal weights is that of a mean. Interval and p-value are Student's with N − 1 degrees of
freedom.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
_MOST_FOR_JACKKNIFE = 2000


@dataclass(frozen=True)
class Difference:
    """A paired difference.

    Attributes:
        value: r.
        stderr: its standard error; None for a single pair.
        pairs: N.
    """

    value: float
    stderr: float | None
    pairs: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % t-interval; None for a single pair."""
        from scipy import stats

        if self.stderr is None:
            return None
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.pairs - 1)) * self.stderr
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p-value of the difference being 0; 1 for a single pair."""
        from scipy import stats

        if not self.stderr:  # one pair, or two points that are the same function
            return 1.0 if self.stderr is None or self.value == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.value) / self.stderr, self.pairs - 1))


def paired_difference(differences: ArrayLike, weights: ArrayLike | None = None) -> Difference:
    """The difference of two conditions from the differences of each text or item.

    Args:
        differences: [N].
        weights: [N], such as the targets of each text; None: all 1.
    """
    d = np.asarray(differences, dtype=np.float64)
    n = np.ones_like(d) if weights is None else np.asarray(weights, dtype=np.float64)
    total, count = max(1.0, n.sum()), len(d)
    ratio = d.sum() / total
    if count < 2:
        return Difference(float(ratio), None, count)
    residual = d - ratio * n if np.ptp(d) or np.ptp(n) else np.zeros_like(d)  # equal pairs have no rounding error
    return Difference(float(ratio), float(np.sqrt(count / (count - 1) * (residual**2).sum()) / total), count)


@dataclass(frozen=True)
class TextLosses:
    """Cross-entropies of some texts under one condition, such as a model.

    Attributes:
        nats: float64 [texts], summed over each text's targets.
        targets: int64 [texts].
    """

    nats: NDArray[np.float64]
    targets: NDArray[np.int64]

    def __add__(self, other: "TextLosses") -> "TextLosses":
        """These texts and further ones."""
        return TextLosses(np.append(self.nats, other.nats), np.append(self.targets, other.targets))

    @property
    def mean(self) -> float:
        """Nats per target."""
        return float(self.nats.sum() / max(1, self.targets.sum()))

    def minus(self, control: "TextLosses") -> Difference:
        """The mean minus that of the same texts under another condition, nats per target."""
        return paired_difference(self.nats - control.nats, self.targets)


def jackknife_stderr(statistic: Callable[..., Any], n: int) -> float | None:
    """Jackknife standard error: leaves out one item at a time; None for fewer than 2 items or more than 2,000.

    Args:
        statistic: takes a list of indices of items.
        n: number of items.
    """
    if not 2 <= n <= _MOST_FOR_JACKKNIFE:
        return None
    everything = list(range(n))
    left_out = [statistic(everything[:i] + everything[i + 1 :]) for i in everything]
    mean = statistics.fmean(left_out)
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left_out))
