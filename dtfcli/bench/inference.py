"""Time and memory of routed models against their own dense backbone, in one process and in turns.

Machines are shared and their clocks drift: a ratio of medians taken alternately holds where absolute times do not.
The notable choices:

- dense and routed models share their weights, so both read the same memory and neither has a cold cache;
- decoding is teacher-forced over fixed ids, dense and routed taking turns token by token, each token three times (the
  caches are cropped between): greedy decoding of random weights repeats itself and measures nothing;
- the share of tokens really routed is measured along with the time, and the bounds are taken at that share.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dtfcli.bench.steps import StepResult
from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.cost.peak import matmul_peak
from dtfcli.models.cache import CACHE_NAME
from dtfcli.models.stack import is_added
from dtfcli.shares import measured_shares

_TURNS = 3
"""How often each token is decoded, its median counting: one pause of the machine would outweigh a difference."""

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class PhaseResult:
    """One model in one phase, next to dense.

    Attributes:
        phase: "prefill" or "decode".
        architecture: "dtf" or "mod".
        capacity: γ asked for.
        routed_share: share of tokens that entered a routed layer, over the tokens timed and all routed layers.
        dense_ms, routed_ms: medians, per forward pass (prefill) or token (decode).
        time_ratio: median of routed / dense over the pairs.
        theory: what the computation alone gives at the realized shares: the FLOP ratio (prefill), or the share of the
            dense weights that are read for a token (decode).
        cache_ratio: bytes of the cache after the phase over those of dense.
        cache_bytes: of the routed model.
        tokens_per_second: of the routed model.
    """

    phase: str
    architecture: str
    capacity: float
    routed_share: float
    dense_ms: float
    routed_ms: float
    time_ratio: float
    theory: float
    cache_ratio: float
    cache_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """All results, and what they were taken on."""

    device: str
    dtype: str
    threads: int
    torch: str
    batch: int
    seq_len: int
    new_tokens: int
    matmul_gflops: float
    results: list[PhaseResult]
    training: list[StepResult] = field(default_factory=list)


@torch.inference_mode()
def bench(
    dense: PreTrainedModel,
    routed: dict[str, PreTrainedModel],
    *,
    capacities: Sequence[float],
    phases: Sequence[str] = ("prefill", "decode"),
    seq_len: int = 512,
    batch: int = 1,
    new_tokens: int = 64,
    repeats: int = 7,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> BenchReport:
    """Measure calibrated routed models against dense.

    Args:
        dense: the backbone, in eval mode.
        routed: architecture → model that shares its weights, calibrated.
        capacities: γ to measure at.
        phases: any of "prefill" and "decode".
        seq_len: tokens of the prompt.
        batch: rows.
        new_tokens: tokens decoded one by one after the prompt.
        repeats: passes of each model in prefill, taken in turns after one of warm-up.
        seed: of the token ids.
        on_progress: called with what is measured next.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, dense.config.vocab_size, (batch, seq_len + new_tokens), generator=generator)
    input_ids = input_ids.to(dense.device)
    results = []
    for architecture, model in routed.items():
        for capacity in capacities:
            model.set_routing("threshold", capacity)  # type: ignore[operator]
            for phase in phases:
                if on_progress is not None:
                    on_progress(f"{phase}, {architecture} at γ {capacity:g}")
                measure = {"prefill": _prefill, "decode": _decode}[phase]
                results.append(measure(dense, model, architecture, capacity, input_ids, seq_len, repeats))
    return BenchReport(
        device=str(dense.device),
        dtype=str(dense.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        batch=batch,
        seq_len=seq_len,
        new_tokens=new_tokens,
        matmul_gflops=(matmul_peak(dense.device, dense.dtype) or 0.0) / 1e9,
        results=results,
    )


def _prefill(
    dense: Any, routed: Any, architecture: str, capacity: float, input_ids: Tensor, seq_len: int, repeats: int
) -> PhaseResult:
    prompt = input_ids[:, :seq_len]

    def run_dense() -> Any:
        return dense(prompt, use_cache=True, logits_to_keep=1)

    def run_routed() -> Any:
        return routed(prompt, use_cache=True, logits_to_keep=1)

    run_dense()
    with measured_shares(routed) as meter:
        run_routed()
    pairs = [(_seconds(run_dense), _seconds(run_routed)) for _ in range(repeats)]
    shares = meter.read()
    flops = forward_flops_per_token(routed, seq_len, shares=shares.by_layer, with_logits=1 / seq_len)
    theory = flops / forward_flops_per_token(routed, seq_len, dense=True, with_logits=1 / seq_len)
    ratio = statistics.median(b / a for a, b in pairs)
    caches = run_dense()[CACHE_NAME], run_routed()[CACHE_NAME]
    return _result("prefill", architecture, capacity, shares.overall, pairs, ratio, theory, caches, prompt.numel())


def _decode(
    dense: Any, routed: Any, architecture: str, capacity: float, input_ids: Tensor, seq_len: int, repeats: int
) -> PhaseResult:
    prompt = input_ids[:, :seq_len]
    caches = tuple(model(prompt, use_cache=True, logits_to_keep=1)[CACHE_NAME] for model in (dense, routed))
    pairs: list[tuple[float, float]] = []
    shares: list[float] = []
    layers_read: list[float] = []
    records: list[Any] = []

    def note_records(stack: Any, arguments: Any, output: Any) -> None:
        records[:] = output.routing  # reading them belongs to the measuring, not to the model: outside of the time

    hook = routed.model.register_forward_hook(note_records)
    for token in input_ids[:, seq_len:].split(1, dim=1):
        plain = partial(dense, token, **{CACHE_NAME: caches[0]})
        ours = partial(routed, token, **{CACHE_NAME: caches[1]})
        turns = []
        for turn in range(_TURNS):
            if turn:
                caches[0].crop(-1)
                caches[1].crop(-1)
            turns.append((_seconds(plain), _seconds(ours)))
        pairs.append((statistics.median(a for a, _ in turns), statistics.median(b for _, b in turns)))
        chosen = torch.stack([record.selected.flatten() for record in records]).float()
        shares.append(float(chosen.mean()))
        layers_read.append(float(chosen.amax(1).mean()))  # a layer's weights are read once, for any row
    hook.remove()
    warm = slice(2, None) if len(pairs) > 4 else slice(None)
    # The total over the pairs: tokens enter different numbers of layers, and a median would show one kind alone.
    ratio = sum(b for _, b in pairs[warm]) / sum(a for a, _ in pairs[warm])
    theory = weights_read(routed, statistics.fmean(layers_read[warm]))
    share = statistics.fmean(shares[warm])
    return _result("decode", architecture, capacity, share, pairs[warm], ratio, theory, caches, len(prompt))


def _result(
    phase: str,
    architecture: str,
    capacity: float,
    share: float,
    pairs: list[tuple[float, float]],
    time_ratio: float,
    theory: float,
    caches: Any,
    tokens: int,
) -> PhaseResult:
    dense_cache, routed_cache = caches
    dense_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense_cache.layers)
    routed_seconds = statistics.median(b for _, b in pairs)
    return PhaseResult(
        phase=phase,
        architecture=architecture,
        capacity=capacity,
        routed_share=share,
        dense_ms=1e3 * statistics.median(a for a, _ in pairs),
        routed_ms=1e3 * routed_seconds,
        time_ratio=time_ratio,
        theory=theory,
        cache_ratio=routed_cache.nbytes / dense_bytes,
        cache_bytes=routed_cache.nbytes,
        tokens_per_second=tokens / routed_seconds,
    )


def weights_read(model: Any, share: float) -> float:
    """Share of the dense backbone's matrices that decoding a token reads when it enters this share of routed layers.

    The embedding is a lookup; the head counts once. PriorFFNs and MoD's routers are read for every token.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    read = dense = float(head)
    routed = {f"layers.{layer}." for layer in config.routed_layer_indices}
    for name, parameter in model.named_parameters():
        if ".layers." not in name or parameter.numel() < config.hidden_size:
            continue
        if is_added(name):
            read += parameter.numel() if "predictor" not in name else 0
            continue
        dense += parameter.numel()
        read += parameter.numel() * (share if any(part in name for part in routed) else 1.0)
    return read / dense


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started
