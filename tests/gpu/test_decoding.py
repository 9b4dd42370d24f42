"""Decoding in fixed shapes on a GPU, where a CUDA graph replays the step: the same as with a cache that grows."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as once
from typing import Any

import pytest
import torch
from torch import Tensor

from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.models.static import StaticLayerCache, StepGraph
from tests.gpu.cases import build, decode, noting_waits
from tests.tiny import tokens

pytestmark = pytest.mark.gpu

WITH_KERNELS = ("forecast error", "forecast error of an MLP", "forecast error of attention")
FIXED = (*WITH_KERNELS, "mod, forecast", "update size", "forecast error, one budget", "random")
every_step = pytest.mark.parametrize(
    ("case", "kernels"), [*((case, False) for case in FIXED), *((case, True) for case in WITH_KERNELS)]
)


@once
def model_of(case: str, device: torch.device, family: str = "llama") -> Any:
    """A model that keeps every key, on the device; leave it as it was."""
    return build(case, family, kv_tokens="all").to(device)


@contextmanager
def triton_kernels(model: Any, used: bool) -> Iterator[None]:
    """Those of a model, for the length of a `with` block."""
    model.model.use_triton_kernels(used)
    try:
        yield
    finally:
        model.model.use_triton_kernels(False)


@pytest.fixture
def replays(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asserts how many tokens graphs were replayed for since the last call; a CPU has none and is not asked."""
    seen: list[Tensor] = []
    plain = StepGraph.replay

    def noted(self: StepGraph, ids: Tensor, positions: Tensor) -> Tensor:
        seen.append(ids)
        return plain(self, ids, positions)

    monkeypatch.setattr(StepGraph, "replay", noted)

    def expect(count: int) -> None:
        assert len(seen) == (count if device.type == "cuda" else 0)
        seen.clear()

    return expect


def left_padding(rows: int, length: int, device: torch.device) -> Tensor:
    """A mask in which row b begins with b tokens of padding."""
    return (torch.arange(length, device=device) >= torch.arange(rows, device=device).unsqueeze(1)).long()


@every_step
@pytest.mark.parametrize("rows", [1, 5])
def test_replayed_is_growing(case: str, kernels: bool, rows: int, device: torch.device, replays: Any) -> None:
    """Two prompts after each other, without and with padding, each with a cache of its own."""
    if kernels:
        pytest.importorskip("triton", reason="the kernels need Triton")
    model = model_of(case, device)
    more = 2 if kernels and device.type == "cpu" else 5  # the interpreter takes its time
    for seed, mask in enumerate((None, left_padding(rows, 11 + more, device))):
        ids = tokens(rows, 11 + more, seed).to(device)
        expected, growing = decode(model, ids, 11, mask, None)
        replays(0)
        with triton_kernels(model, kernels):
            logits, cache = decode(model, ids, 11, mask, 20)
        replays(more)
        assert (logits - expected).abs().max() <= 1e-4
        assert cache.get_seq_length() == growing.get_seq_length() == 11 + more
        assert isinstance(cache.layers[0], StaticLayerCache)
        cache.to_dynamic()
        for ours, its in zip(cache.layers, growing.layers, strict=True):
            real = slice(None) if mask is None else slice(rows, None)
            assert (ours.keys - its.keys)[:, :, real].abs().max() <= 1e-4
            assert (ours.values - its.values)[:, :, real].abs().max() <= 1e-4


def test_replayed_is_what_the_cpu_says(device: torch.device, replays: Any) -> None:
    for family in ("llama", "qwen2"):
        ids = tokens(2, 30)
        expected, _ = decode(model_of("forecast error", torch.device("cpu"), family), ids, 20, None, None)
        logits, _ = decode(model_of("forecast error", device, family), ids.to(device), 20, None, 32)
        replays(10)
        assert (logits.cpu() - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("sinks", "attention"), [(14, "sdpa"), (1, "eager")])
def test_sinks_and_other_attention(sinks: int, attention: str, device: torch.device, replays: Any) -> None:
    """Sinks of short texts come among the decoded tokens."""
    model, ids = build("update size", kv_tokens="all", sink_tokens=sinks).to(device), tokens(2, 20, 4).to(device)
    model.set_attn_implementation(attention)
    expected, _ = decode(model, ids, 10, None, None)
    logits, _ = decode(model, ids, 10, None, 20)
    replays(10)
    assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kernels", [False, True])
@torch.no_grad()
def test_bfloat16(kernels: bool, device: torch.device, replays: Any) -> None:
    """Every token enters, so that no rounding moves one across a threshold."""
    if kernels:
        pytest.importorskip("triton", reason="the kernels need Triton")
    model = build("forecast error", kv_tokens="all").to(device, torch.bfloat16)
    ids = tokens(2, 16).to(device)
    with triton_kernels(model, kernels), model.routing_mode("threshold", 1.0):
        expected, _ = decode(model, ids, 10, None, None)
        logits, _ = decode(model, ids, 10, None, 20)
    replays(6)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).float().abs().max() <= 0.05 * expected.float().abs().max()


@torch.no_grad()
def test_crop_reorder_and_several_tokens_at_once(device: torch.device, replays: Any) -> None:
    model, ids = model_of("forecast error", device), tokens(2, 50).to(device)
    found = []
    for length in (None, 64):
        cache = RoutedCache(model.config, length)

        def at(ids: Tensor, start: int, end: int, cache: RoutedCache = cache) -> Tensor:
            return model(ids[:, start:end], **{CACHE_NAME: cache}).logits.clone()

        at(ids, 0, 20)
        for n in range(20, 26):
            at(ids, n, n + 1)
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0], device=device))
        turned = ids.flip(0)
        logits = [at(turned, n, n + 1) for n in range(24, 30)]
        logits.append(at(turned, 30, 37))  # as assisted decoding does
        logits += [at(turned, n, n + 1) for n in range(37, 40)]
        assert cache.get_seq_length() == 40
        replays(0 if length is None else 6 + 6 + 3)
        found.append(torch.cat(logits, dim=1))
    assert (found[0] - found[1]).abs().max() <= 1e-4


@torch.no_grad()
def test_a_replayed_step_follows_thresholds_and_capacity(device: torch.device) -> None:
    """They may change while a text is continued: a graph must not go on with those that it was captured with."""
    model, ids = build("forecast error", kv_tokens="all").to(device), tokens(1, 30).to(device)
    found = []
    for length in (None, 40):
        cache = RoutedCache(model.config, length)
        model(ids[:, :20], **{CACHE_NAME: cache})
        logits = [model(ids[:, 20:21], **{CACHE_NAME: cache}).logits.clone()]
        with model.routing_mode("threshold", 1.0):
            logits += [model(ids[:, n : n + 1], **{CACHE_NAME: cache}).logits.clone() for n in range(21, 25)]
        logits += [model(ids[:, n : n + 1], **{CACHE_NAME: cache}).logits.clone() for n in range(25, 30)]
        found.append(torch.cat(logits, dim=1))
    assert (found[0] - found[1]).abs().amax((0, 2)).tolist() == pytest.approx([0.0] * 10, abs=1e-4)


@torch.no_grad()
def test_logits_are_the_callers_own(device: torch.device) -> None:
    """Those of a token stay what they are when the next one is decoded."""
    model, ids = model_of("forecast error", device), tokens(1, 12).to(device)
    cache = RoutedCache(model.config, 20)
    model(ids[:, :10], **{CACHE_NAME: cache})
    first = model(ids[:, 10:11], **{CACHE_NAME: cache}).logits
    kept = first.clone()
    model(ids[:, 11:12], **{CACHE_NAME: cache})
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
def test_generate(how: dict[str, Any], device: torch.device, replays: Any) -> None:
    """With left padding; twice, as one text after the other."""
    model = model_of("forecast error", device)
    for seed in range(2):
        ids = tokens(2, 9, seed).to(device)
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": left_padding(2, 9, device), **how}
        texts = []
        for fixed in ({}, {"cache_implementation": "static"}):
            torch.manual_seed(3)
            texts.append(model.generate(ids, pad_token_id=0, **options, **fixed))
            replays(11 if fixed else 0)
        assert torch.equal(*texts)


@torch.no_grad()
def test_nobody_waits_for_a_replayed_token(device: torch.device, replays: Any) -> None:
    model, ids = model_of("forecast error", device), tokens(2, 30).to(device)
    cache, mask = RoutedCache(model.config, 40), torch.ones_like(ids)
    model(ids[:, :20], **{CACHE_NAME: cache})
    model(ids[:, 20:21], **{CACHE_NAME: cache})
    with noting_waits(device) as places:
        for n in range(21, 26):
            model(ids[:, n : n + 1], **{CACHE_NAME: cache})
        for n in range(26, 30):
            model(ids[:, n : n + 1], attention_mask=mask[:, : n + 1], **{CACHE_NAME: cache})
    assert places == []
    replays(10)
