"""Differences between models, with standard errors over the same items."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtfcli.evaluation.report import EvalReport, Items

_MOST_FOR_JACKKNIFE = 2000


@dataclass(frozen=True)
class Difference:
    """A metric of one model minus that of the first model.

    Attributes:
        task, metric: names of the score.
        model: the other model.
        value: the difference.
        stderr: of the difference; None where it is not known.
        paired: whether the standard error was taken item by item.
        n: items.
    """

    task: str
    metric: str
    model: str
    value: float
    stderr: float | None
    paired: bool
    n: int


def paired_differences(reports: Sequence[EvalReport]) -> list[Difference]:
    """Differences to the first model, for each score that another one shares with it."""
    first, differences = reports[0], []
    for other in reports[1:]:
        for task, score in first.results.items():
            theirs = other.results.get(task)
            for metric, mine in score.metrics.items():
                if theirs is None or metric not in theirs.metrics:
                    continue
                value = theirs.metrics[metric].value - mine.value
                stderr = paired_stderr(first.items.get(task), other.items.get(task), metric)
                paired = stderr is not None
                if not paired:
                    stderr = _independent(mine.stderr, theirs.metrics[metric].stderr)
                differences.append(Difference(task, metric, other.model, value, stderr, paired, score.n))
    return differences


def paired_stderr(first: Items | None, other: Items | None, metric: str) -> float | None:
    """Standard error of the difference of two scores over the same items; None where items or metric differ.

    A mean takes the standard error of the items' differences. Any other aggregate takes the jackknife, which leaves
    out one item at a time from both.
    """
    if first is None or other is None or first.hashes != other.hashes or metric not in first.values:
        return None
    a, b = first.values[metric], other.values.get(metric, [])
    n = len(a)
    if n < 2 or len(b) != n or n != len(first.hashes):
        return None
    aggregate = first.aggregate[metric]
    if getattr(aggregate, "__name__", "") == "mean":
        return statistics.stdev([float(y) - float(x) for x, y in zip(a, b, strict=True)]) / math.sqrt(n)
    return jackknife_stderr(lambda kept: aggregate([b[i] for i in kept]) - aggregate([a[i] for i in kept]), n)


def jackknife_stderr(statistic: Any, n: int) -> float | None:
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


def _independent(first: float | None, other: float | None) -> float | None:
    return None if first is None or other is None else math.hypot(first, other)
