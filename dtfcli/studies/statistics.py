"""Paired differences between the points of a study, with 95 % intervals, by scipy and statsmodels.

Two sources of chance are kept apart. *By seed*: another seed gives other routers, another order and other held-out
text; the t-interval over paired seeds covers that. *By document*: another validation text gives another loss; the
bootstrap over paired documents covers that, for these seeds. Two seeds are too few for a t-interval, so below three
the verdict rests on the larger of the two standard errors, and says how few seeds there were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtfcli.errors import ConfigError

LEVEL = 0.95
_RESAMPLES = 2000
_ENOUGH_SEEDS = 3


@dataclass(frozen=True)
class Losses:
    """Cross-entropies of one model on its held-out documents.

    Attributes:
        nats: float64 [documents], summed over each document's targets.
        targets: int64 [documents].
    """

    nats: NDArray[np.float64]
    targets: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Nats per target."""
        return float(self.nats.sum() / self.targets.sum())


@dataclass(frozen=True)
class Difference:
    """The loss of one point of the grid minus that of the control, nats per token.

    Attributes:
        name, control: of the two points.
        value: mean over seeds of the paired differences.
        sd: their standard deviation over seeds; None with one seed.
        by_seed: t-interval of the mean; None with one seed.
        by_document: bootstrap interval over the documents of all seeds.
        p: two-sided: t-test over seeds; with two, by the larger standard error; with one, the bootstrap's.
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
        """What follows, with its uncertainty."""
        verdict = "no difference found"
        if self.is_found:
            verdict = "worse" if self.value > 0 else "better"
        error = self.sd if self.sd is not None else (self.by_document[1] - self.by_document[0]) / 2
        chance = f"{self.seeds} seeds" if self.seeds >= _ENOUGH_SEEDS else f"only {self.seeds}, too few for a t-test"
        what = f"{self.title}: {self.value:+.3f} ± {error:.3f} nats, p {self.p_holm:.2g}"
        return f"{what} ({chance}): {verdict}"


def differences(
    losses: Mapping[str, Mapping[int, Losses]], pairs: Sequence[tuple[str, str]], random_state: int = 0
) -> list[Difference]:
    """Differences of points to their controls, paired by seed and document, Holm-corrected together.

    Args:
        losses: point → seed → losses.
        pairs: names of a point and of its control.
        random_state: of the bootstrap.

    Raises:
        ConfigError: a pair has no seed or other documents in common.
    """
    found = [_difference(name, control, losses[name], losses[control], random_state) for name, control in pairs]
    corrected = _holm([difference["p"] for difference in found])
    return [Difference(**difference, p_holm=p) for difference, p in zip(found, corrected, strict=True)]


def _difference(
    name: str, control: str, ours: Mapping[int, Losses], theirs: Mapping[int, Losses], random_state: int
) -> dict[str, Any]:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ConfigError(f"{name} and {control} have no seed in common; train the same seeds of both.")
    for seed in seeds:
        if not np.array_equal(ours[seed].targets, theirs[seed].targets):
            raise ConfigError(f"{name} and {control}, seed {seed}: other held-out documents; they cannot be paired.")
    if sum(len(ours[seed].nats) for seed in seeds) < 2:
        raise ConfigError(f"{name} and {control}: a single held-out document has no interval; hold out more text.")
    nats = np.concatenate([ours[seed].nats - theirs[seed].nats for seed in seeds])
    targets = np.concatenate([ours[seed].targets for seed in seeds])
    by_seed = np.array([ours[seed].mean - theirs[seed].mean for seed in seeds])
    interval, p, error = _bootstrap(nats, targets, random_state)
    t_interval = None
    if len(seeds) > 1:
        t_interval, p_of_seeds = t_test(by_seed)
        p = p_of_seeds if len(seeds) >= _ENOUGH_SEEDS else _larger_error(by_seed, error)
    return {
        "name": name,
        "control": control,
        "value": float(by_seed.mean()),
        "sd": float(by_seed.std(ddof=1)) if len(seeds) > 1 else None,
        "by_seed": t_interval,
        "by_document": interval,
        "p": p,
        "seeds": len(seeds),
        "documents": len(nats),
    }


def t_test(values: NDArray[np.float64]) -> tuple[tuple[float, float], float]:
    """95 % interval of the mean of paired differences, and the two-sided p of its being 0."""
    from scipy import stats

    if not np.ptp(values):  # such as two points that are the same function
        return (float(values[0]), float(values[0])), 1.0 if values[0] == 0 else 0.0
    result = stats.ttest_1samp(values, 0.0)
    low, high = result.confidence_interval(LEVEL)
    return (float(low), float(high)), float(result.pvalue)


def _bootstrap(
    nats: NDArray[np.float64], targets: NDArray[np.int64], random_state: int
) -> tuple[tuple[float, float], float, float]:
    """95 % interval of Σ nats / Σ targets over resampled documents, the two-sided p of its being 0, its error."""
    from scipy import stats

    def per_target(d: Any, n: Any, axis: int = -1) -> Any:
        return d.sum(axis=axis) / n.sum(axis=axis)

    result = stats.bootstrap(
        (nats, targets),
        per_target,
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(random_state),
        batch=200,
    )
    low, high = result.confidence_interval
    drawn = result.bootstrap_distribution
    p = 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())
    return (float(low), float(high)), float(min(1.0, max(p, 1 / _RESAMPLES))), float(result.standard_error)


def _larger_error(by_seed: NDArray[np.float64], error: float) -> float:
    """Two-sided p of a mean over two seeds, by the larger of its standard errors: over documents, or over seeds."""
    from scipy import stats

    larger = max(error, float(stats.sem(by_seed)))
    if larger == 0:
        return 1.0 if by_seed.mean() == 0 else 0.0
    return float(2 * stats.norm.sf(abs(by_seed.mean()) / larger))


def _holm(p_values: Sequence[float]) -> list[float]:
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError as error:
        raise ConfigError("dtf compare needs statsmodels: pip install 'dtfcli[compare]'.") from error
    return [float(p) for p in multipletests(p_values, method="holm")[1]]
