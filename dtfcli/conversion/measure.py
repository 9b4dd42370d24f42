"""A routed model next to its dense one, at several γ: loss, likeliest tokens, KL, routed share, and time in turns.

Both read the same rows, a few at a time, so their logits are never held for all rows. Passes over rows are timed as
they come, dense and every γ taking turns; tokens are decoded one by one, teacher-forced, in turns as well.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dtfcli.conversion.text import Rows
from dtfcli.cost.peak import synchronize
from dtfcli.models.cache import CACHE_NAME
from dtfcli.shares import measured_shares
from dtfcli.statistics import Difference, paired_difference

_LOGITS = 2**25
"""Numbers of logits that one model's pass may give; each row is compared by itself."""
_PROMPT, _NEW_TOKENS, _WARM = 16, 10, 2


@dataclass
class _Sums:
    """What rows gave at one γ, by row."""

    gap: list[float] = field(default_factory=list)  # nats, summed over a row's targets
    same: list[float] = field(default_factory=list)  # places where the likeliest token is dense's
    kl: list[float] = field(default_factory=list)  # nats, summed over places
    shares: list[float] = field(default_factory=list)  # routed, of a pass
    times: list[float] = field(default_factory=list)  # of a pass, over dense


@dataclass(frozen=True)
class Compared:
    """A model at one γ next to dense.

    Attributes:
        tokens: of the rows.
        gap: of the loss, nats per token, paired over documents.
        agreement: share of places where the likeliest token is the dense model's.
        kl: KL(dense ‖ routed), nats, mean over places.
        routed_share: of tokens that entered, mean over routed layers.
        prefill_time: seconds of a pass over rows, over dense; median.
    """

    tokens: int
    gap: Difference
    agreement: float
    kl: float
    routed_share: float
    prefill_time: float


@torch.inference_mode()
def compare(
    dense: Any,
    routed: Any,
    rows: Rows,
    capacities: Mapping[float, int],
    dtype: torch.dtype,
    on_progress: Callable[[float], None],
) -> tuple[dict[float, Compared], float]:
    """Compare a routed model with dense at several γ.

    Args:
        dense, routed: in eval mode, on one device.
        rows: text that neither was fitted to.
        capacities: γ → the number of rows, from the first, that it is measured on.
        dtype: precision of the computation.
        on_progress: called with the share done.

    Returns:
        By γ; and the dense model's loss over all rows, nats per token.
    """
    device = dense.device
    length, vocabulary = rows.ids.shape[1], dense.config.vocab_size
    step = rows_together(vocabulary, length)
    sums, losses = {capacity: _Sums() for capacity in capacities}, list[float]()
    most, done, work = max(capacities.values()), 0, sum(capacities.values()) + max(capacities.values())
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for model in (dense, routed):  # warm
            model(rows.ids[:1].to(device))
        for start in range(0, most, step):
            ids = rows.ids[start : min(start + step, most)].to(device)
            dense_seconds, logits = _timed(dense, ids)
            reference = _Reference.of(logits, ids)
            del logits
            losses += reference.nll.sum(1).tolist()
            for capacity, count in capacities.items():
                part = ids[: max(0, count - start)]
                if not len(part):
                    continue
                with routed.routing_mode("threshold", capacity), measured_shares(routed) as meter:
                    seconds, logits = _timed(routed, part)
                if len(part) == len(ids):
                    sums[capacity].times.append(seconds / dense_seconds)
                sums[capacity].shares.append(meter.read().overall)
                reference.add(sums[capacity], logits, part)
                done += len(part)
                on_progress((done + start) / work)
    units, targets = rows.units.tolist(), length - 1
    return (
        {capacity: _compared(each, units, targets) for capacity, each in sums.items()},
        sum(losses) / (len(losses) * targets),
    )


def rows_together(vocabulary: int, length: int) -> int:
    """Rows of a pass."""
    return max(1, min(512, _LOGITS // vocabulary) // length)


def _timed(model: Any, ids: Tensor, **options: Any) -> tuple[float, Tensor]:
    synchronize(ids.device)
    began = time.perf_counter()
    logits: Tensor = model(ids, **({"use_cache": False} | options)).logits
    synchronize(ids.device)
    return time.perf_counter() - began, logits


@dataclass(frozen=True)
class _Reference:
    """The dense model on some rows: float32.

    Attributes:
        p: probabilities, [B, T, V].
        nll: −ln p of each token but a row's first, [B, T − 1].
        entropy: summed over a row's places, [B].
        top: likeliest tokens, int64 [B, T, 1].
    """

    p: Tensor
    nll: Tensor
    entropy: Tensor
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor, ids: Tensor) -> "_Reference":
        """Of logits [B, T, V]."""
        scores = logits.float()
        total = scores.logsumexp(-1)
        p = (scores - total.unsqueeze(-1)).exp_()
        entropy = (total - _dot(p, scores)).sum(1)
        return cls(p, _nll(scores, total, ids), entropy, scores.argmax(-1, keepdim=True))

    def add(self, sums: _Sums, logits: Tensor, ids: Tensor) -> None:
        """Compare other logits of the first of the rows; KL(p ‖ q) = −H(p) − Σ p ln q, a row at a time."""
        for row, each in enumerate(logits):
            scores = each.float()
            total = scores.logsumexp(-1)
            crossed = (total - _dot(self.p[row], scores)).sum()
            sums.gap.append(float((_nll(scores, total, ids[row]) - self.nll[row]).sum()))
            same = scores.gather(-1, self.top[row]) >= scores.amax(-1, keepdim=True)  # many times faster than argmax
            sums.same.append(float(same.sum()))
            sums.kl.append(float(crossed - self.entropy[row]))


def _dot(p: Tensor, scores: Tensor) -> Tensor:
    """Σ p · scores of each place, as one product: [..., V] each → [...]."""
    return (p.unsqueeze(-2) @ scores.unsqueeze(-1)).flatten(-3)


def _nll(scores: Tensor, total: Tensor, ids: Tensor) -> Tensor:
    """−ln p of each token but a row's first: logits [..., T, V], their logsumexp [..., T], ids → [..., T − 1]."""
    return total[..., :-1] - scores[..., :-1, :].gather(-1, ids[..., 1:].unsqueeze(-1)).squeeze(-1)


def _compared(sums: _Sums, units: Sequence[int], targets: int) -> Compared:
    gaps, weights = dict[int, float](), dict[int, int]()
    for unit, gap in zip(units, sums.gap, strict=False):
        gaps[unit], weights[unit] = gaps.get(unit, 0.0) + gap, weights.get(unit, 0) + targets
    places = len(sums.gap) * (targets + 1)
    return Compared(
        tokens=places,
        gap=paired_difference([*gaps.values()], [*weights.values()]),
        agreement=sum(sums.same) / places,
        kl=sum(sums.kl) / places,
        routed_share=statistics.fmean(sums.shares),
        prefill_time=statistics.median(sums.times),
    )


@torch.inference_mode()
def decoding_times(
    dense: Any, routed: Any, rows: Rows, capacities: Sequence[float], on_share: Callable[[float], None]
) -> dict[float, float]:
    """Seconds of a decoded token over dense, by γ: all take turns over the same tokens, in the weights' precision."""
    ids = rows.ids[:1, : _PROMPT + _NEW_TOKENS].to(dense.device)
    prompt, tokens = ids[:, :_PROMPT], ids[:, _PROMPT:].split(1, dim=1)
    names = [None, *capacities]
    seconds = dict.fromkeys(names, 0.0)
    caches = {}
    for name in names:
        with nullcontext() if name is None else routed.routing_mode("threshold", name):
            model = dense if name is None else routed
            caches[name] = model(prompt, use_cache=True, logits_to_keep=1)[CACHE_NAME]
    for number, token in enumerate(tokens):
        for name in names:
            model = dense if name is None else routed
            with nullcontext() if name is None else routed.routing_mode("threshold", name):
                time_taken, _ = _timed(model, token, use_cache=True, **{CACHE_NAME: caches[name]})
            seconds[name] += time_taken * (number >= _WARM)
        on_share((number + 1) / len(tokens))
    return {capacity: seconds[capacity] / seconds[None] for capacity in capacities}
