"""Differences between the scores of models, with standard errors over the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dtfcli.evaluation.report import EvalReport, Items
from dtfcli.statistics import jackknife_stderr, paired_difference


@dataclass(frozen=True)
class ScoreDifference:
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


def score_differences(reports: Sequence[EvalReport]) -> list[ScoreDifference]:
    """Differences to the first model, for each score that another one shares with it."""
    first, differences = reports[0], []
    for other in reports[1:]:
        for task, score in first.results.items():
            theirs = other.results.get(task)
            for name, ours in score.metrics.items():
                if theirs is None or name not in theirs.metrics:
                    continue
                metric = theirs.metrics[name]
                stderr = paired_stderr(first.items.get(task), other.items.get(task), name)
                paired = stderr is not None
                if not paired and ours.stderr is not None and metric.stderr is not None:
                    stderr = math.hypot(ours.stderr, metric.stderr)
                value = metric.value - ours.value
                differences.append(ScoreDifference(task, name, other.model, value, stderr, paired, score.n))
    return differences


def paired_stderr(first: Items | None, other: Items | None, metric: str) -> float | None:
    """Standard error of the difference of two scores over the same items; None where items or metric differ.

    A mean takes the standard error of the items' differences. Any other aggregate takes the jackknife, which leaves
    out one item at a time from both.
    """
    if first is None or other is None or first.hashes != other.hashes or metric not in first.values:
        return None
    a, b = first.values[metric], other.values.get(metric, [])
    if not len(a) == len(b) == len(first.hashes):
        return None
    aggregate = first.aggregate[metric]
    if getattr(aggregate, "__name__", "") == "mean":
        return paired_difference([float(y) - float(x) for x, y in zip(a, b, strict=True)]).stderr
    return jackknife_stderr(lambda kept: aggregate([b[i] for i in kept]) - aggregate([a[i] for i in kept]), len(a))
