"""Prefill and decoding of routed models against their own dense backbone, in turns.

- Dense and routed models share their weights, so both read the same memory and neither has a cold cache.
- Decoding is teacher-forced over fixed ids, dense and routed taking turns token by token, each token three times (the
  caches are cropped between): greedy decoding of random weights repeats itself and measures nothing.
- The share of tokens really routed is measured along with the time, and the bounds are taken at that share.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dtfcli.bench.report import BenchOptions, PhaseResult
from dtfcli.cost.accounting import LAYER, forward_flops_per_token, in_routed_part, met_numbers
from dtfcli.generation import cache_bytes
from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM
from dtfcli.models.observed import observed_passes
from dtfcli.models.pretrained import is_added
from dtfcli.models.static import static_layers
from dtfcli.shares import measured_shares
from dtfcli.training.compiling import compile_layers

_TURNS = 3
"""How often each token is decoded, its median counting: one pause of the machine would outweigh a difference."""


class _Timing(NamedTuple):
    """One model in one phase; `time_ratio` and `theory` as in `PhaseResult`."""

    pairs: list[tuple[float, float]]  # seconds of dense and routed, taken in turns
    time_ratio: float
    theory: float
    share: float  # of tokens routed
    caches: tuple[Any, Any]  # of dense and routed, after the phase
    tokens: int  # that a pair processes


@torch.inference_mode()
def bench_inference(
    dense: PreTrainedModel, routed: dict[str, PreTrainedModel], options: BenchOptions, note: Callable[[str], None]
) -> list[PhaseResult]:
    """Measure calibrated routed models against dense.

    Args:
        dense: the backbone, in eval mode.
        routed: architecture → model that shares its weights, calibrated.
        options: what to measure.
        note: called with the name of the next measurement.
    """
    input_ids = options.random_ids(dense.config.vocab_size, options.seq_len + options.new_tokens).to(dense.device)
    prompt, continuation = input_ids[:, : options.seq_len], input_ids[:, options.seq_len :]
    if options.compiled and options.static:
        for model in (dense, *routed.values()):
            compile_layers(model)
    results = []
    for architecture, model in routed.items():
        for capacity in options.capacities:
            model.set_routing("threshold", capacity)  # type: ignore[operator]
            for phase in options.inference_phases:
                note(f"{phase}, {architecture} at γ {capacity:g}")
                if phase == "prefill":
                    timing = _prefill(dense, model, prompt, options.repeats)
                else:
                    timing = _decode(dense, model, prompt, continuation, options.static)
                results.append(_result(phase, architecture, capacity, timing))
    return results


def _prefill(dense: Any, routed: Any, prompt: Tensor, repeats: int) -> _Timing:
    run_dense, run_routed = (partial(model, use_cache=True, logits_to_keep=1) for model in (dense, routed))
    run_dense(prompt)
    with measured_shares(routed) as meter:
        run_routed(prompt)
    # Each turn lets other numbers of tokens enter: a library that prepares itself for every number does so, as in use.
    prompts = [prompt.roll(turn + 1, 1) for turn in range(repeats)]
    pairs = [(_seconds(partial(run_dense, text)), _seconds(partial(run_routed, text))) for text in prompts]
    shares, length = meter.read(), prompt.shape[1]
    flops = forward_flops_per_token(routed, length, shares=shares.by_layer, with_logits=1 / length)
    return _Timing(
        pairs,
        time_ratio=statistics.median(b / a for a, b in pairs),
        theory=flops / forward_flops_per_token(routed, length, dense=True, with_logits=1 / length),
        share=shares.overall,
        caches=(run_dense(prompt)[CACHE_NAME], run_routed(prompt)[CACHE_NAME]),
        tokens=prompt.numel(),
    )


class _DenseStatic:
    """The dense model with a static cache, as routed ones have it."""

    def __init__(self, dense: Any, cache: Any, length: int) -> None:
        self.dense, self.cache = dense, cache
        cache.layers, self.state = static_layers(cache.layers, length, None)

    def _step(self, ids: Tensor, positions: Tensor) -> Tensor:
        filled = self.state.filled.index_fill_(1, self.state.position, True)
        seen = {"attention_mask": filled[:, None, None], "position_ids": positions, CACHE_NAME: self.cache}
        logits = self.dense(ids, **seen).logits
        self.state.advance()
        return logits

    def __call__(self, token: Tensor) -> Tensor:
        return self.state.run(self._step, token, self.state.position.expand(len(token), 1))


def _decode(dense: Any, routed: Any, prompt: Tensor, continuation: Tensor, static: bool) -> _Timing:
    length = prompt.shape[1] + continuation.shape[1]
    dense_cache = dense(prompt, use_cache=True, logits_to_keep=1)[CACHE_NAME]
    if isinstance(routed, RoutedCausalLM):
        routed_cache = routed(prompt, use_cache=True, logits_to_keep=1)[CACHE_NAME]
    else:
        routed_cache = RoutedCache(routed.config, length if static else None)
        routed(prompt, logits_to_keep=1, **{CACHE_NAME: routed_cache})
    dense_static = _DenseStatic(dense, dense_cache, length) if static else None
    pairs: list[tuple[float, float]] = []
    shares: list[float] = []
    layers_read: list[float] = []
    records: list[Any] = []

    def note_records(output: Any) -> None:
        records[:] = output.routing  # reading them belongs to the measuring, not to the model: outside of the time

    for token in continuation.split(1, dim=1):
        plain = partial(dense_static or partial(dense, **{CACHE_NAME: dense_cache}), token)
        ours = partial(routed, token, **{CACHE_NAME: routed_cache})
        turns = []
        for turn in range(_TURNS):
            if turn:
                dense_cache.crop(-1)
                if dense_static is not None:
                    dense_static.state.crop(1)
                routed_cache.crop(-1)
            with nullcontext() if turn else observed_passes(routed, note_records):
                turns.append((_seconds(plain), _seconds(ours)))
        pairs.append((statistics.median(a for a, _ in turns), statistics.median(b for _, b in turns)))
        chosen = torch.stack([record.selected.flatten() for record in records]).float()
        shares.append(float(chosen.mean()))
        layers_read.append(float(chosen.amax(1).mean()))  # a layer's weights are read once, for any row
    warm = slice(2, None) if len(pairs) > 4 else slice(None)
    return _Timing(
        pairs[warm],
        # The total over the pairs: tokens enter different numbers of layers, and a median would show one kind alone.
        time_ratio=sum(b for _, b in pairs[warm]) / sum(a for a, _ in pairs[warm]),
        theory=weights_read(routed, statistics.fmean(layers_read[warm])),
        share=statistics.fmean(shares[warm]),
        caches=(dense_cache, routed_cache),
        tokens=len(prompt),
    )


def _result(phase: str, architecture: str, capacity: float, timing: _Timing) -> PhaseResult:
    dense_cache, routed_cache = timing.caches
    routed_seconds = statistics.median(b for _, b in timing.pairs)
    return PhaseResult(
        phase=phase,
        architecture=architecture,
        capacity=capacity,
        routed_share=timing.share,
        dense_ms=1e3 * statistics.median(a for a, _ in timing.pairs),
        routed_ms=1e3 * routed_seconds,
        time_ratio=timing.time_ratio,
        theory=timing.theory,
        cache_ratio=cache_bytes(routed_cache) / cache_bytes(dense_cache),
        cache_bytes=cache_bytes(routed_cache),
        tokens_per_second=timing.tokens / routed_seconds,
    )


def weights_read(model: Any, share: float) -> float:
    """Share of the dense backbone's matrices that decoding a token reads when it enters this share of routed layers.

    The embedding is a lookup; the head counts once. PriorFFNs and MoD's routers are read for every token, forecasts for
    tokens that skip, and with keys of all tokens the matrices that make them.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    read = dense = float(head)
    for name, parameter in model.named_parameters():
        match = LAYER.search(name)
        if match is None or parameter.numel() < config.hidden_size:
            continue
        routed = int(match.group(1)) in config.routed_layer_indices
        if is_added(name):
            skipping = 1.0 - share if "forecast" in name else 1.0
            read += met_numbers(model, name, parameter) * skipping if "predictor" not in name else 0
            continue
        met = met_numbers(model, name, parameter)
        dense += met
        always = config.keeps_every_key and ("k_proj" in name or "v_proj" in name)
        read += met * (share if routed and in_routed_part(config, name) and not always else 1.0)
    return read / dense


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started
