"""Differences between the points of a study, with 95 % intervals and one verdict each.

Two sources of chance are kept apart. *By seed*: another seed gives other routers, another order and other held-out
text; the t-interval over paired seeds covers that. *By document*: another validation text gives another loss; the
t-interval over paired documents covers that, for these seeds. Two seeds are too few for a t-interval, so below three
the verdict rests on the larger of the two standard errors, and says how few seeds there were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from dtfcli.errors import ConfigError
from dtfcli.statistics import LEVEL, TextLosses, paired_difference

_ENOUGH_SEEDS = 3


@dataclass(frozen=True)
class PointDifference:
    """The loss of one point of the grid minus that of the control, nats per token.

    Attributes:
        value: mean over seeds of the paired differences.
        sd: their standard deviation over seeds; None with one seed.
        by_seed: t-interval of the mean; None with one seed.
        by_document: t-interval over the documents of all seeds.
        p: two-sided: over seeds; with two, by the larger standard error; with one, over documents.
        p_holm: corrected for all differences of the study.
        seeds, documents: how many pairs.
    """

    name: str
    control: str
    value: float
    sd: float | None
    by_seed: tuple[float, float] | None
    by_document: tuple[float, float]
    p: float
    p_holm: float
    seeds: int
    documents: int

    @property
    def is_found(self) -> bool:
        """Whether there is a difference: the corrected p is below 0.05, and the documents' interval agrees."""
        low, high = self.by_document
        return self.p_holm < 1 - LEVEL and (low > 0 or high < 0)

    @property
    def title(self) -> str:
        """Which two points."""
        return f"{self.name} − {self.control}"

    @property
    def sentence(self) -> str:
        """The result, with its uncertainty."""
        verdict = "no difference found"
        if self.is_found:
            verdict = "worse" if self.value > 0 else "better"
        error = self.sd if self.sd is not None else (self.by_document[1] - self.by_document[0]) / 2
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        if self.seeds < _ENOUGH_SEEDS:
            seeds += ", too few for a t-test"
        return f"{self.title}: {self.value:+.3f} ± {error:.3f} nats, p {self.p_holm:.2g} ({seeds}): {verdict}"


def differences(
    losses: Mapping[str, Mapping[int, TextLosses]], pairs: Sequence[tuple[str, str]]
) -> list[PointDifference]:
    """Differences of points to their controls, paired by seed and document, Holm-corrected together.

    Args:
        losses: point → seed → losses by document.
        pairs: names of a point and of its control.

    Raises:
        ConfigError: a pair has no seed or other documents in common.
    """
    uncorrected = [_difference(name, control, losses[name], losses[control]) for name, control in pairs]
    corrected = _holm([difference.p for difference in uncorrected])
    return [replace(difference, p_holm=p) for difference, p in zip(uncorrected, corrected, strict=True)]


def _difference(
    name: str, control: str, ours: Mapping[int, TextLosses], theirs: Mapping[int, TextLosses]
) -> PointDifference:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ConfigError(f"{name} and {control} have no seed in common; train the same seeds of both.")
    for seed in seeds:
        if not np.array_equal(ours[seed].targets, theirs[seed].targets):
            raise ConfigError(f"{name} and {control}, seed {seed}: other held-out documents; they cannot be paired.")
    by_document = reduce(add, (ours[seed] for seed in seeds)).minus(reduce(add, (theirs[seed] for seed in seeds)))
    if by_document.interval is None:
        raise ConfigError(f"{name} and {control}: a single held-out document has no interval; hold out more text.")
    by_seed = paired_difference([ours[seed].mean - theirs[seed].mean for seed in seeds])
    p = by_seed.p
    if len(seeds) < _ENOUGH_SEEDS:
        error = max(by_seed.stderr or 0.0, by_document.stderr or 0.0)
        p = replace(by_document, value=by_seed.value, stderr=error).p
    return PointDifference(
        name,
        control,
        by_seed.value,
        None if by_seed.stderr is None else by_seed.stderr * len(seeds) ** 0.5,
        by_seed.interval,
        by_document.interval,
        p,
        p,
        len(seeds),
        by_document.pairs,
    )


def _holm(p_values: Sequence[float]) -> list[float]:
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError as error:
        raise ConfigError("dtf compare needs statsmodels: pip install 'dtfcli[compare]'.") from error
    return [float(p) for p in multipletests(p_values, method="holm")[1]]
