"""Decoding with a static cache says what decoding says; on a GPU a CUDA graph replays the same step for every token."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.models.static import StaticLayerCache, StepGraph
from dtfcli.training.compiling import compile_layers
from tests.budget import examples
from tests.cases import EVERY_WAY, QUICK, Case, decode, on_devices
from tests.tiny import routed_model, tokens
from tests.waits import noting_waits

BY_TOKEN = [case for case in EVERY_WAY if case.chooses_tokens and not case.way.startswith("surprise")]
"""Ways whose score is that of the token alone."""
EVERY_KEY = Case("forecast error, every key", "llama")
every_static = on_devices([(case, case.way in QUICK) for case in BY_TOKEN], BY_TOKEN)
one_case = on_devices([(EVERY_KEY, True)], [EVERY_KEY])


def model_of(case: Case, device: torch.device, **fields: Any) -> Any:
    """A model that keeps every key; do not change it."""
    return case.on(device, kv_tokens="all", **fields)


@pytest.fixture
def replays(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Asserts for how many tokens graphs were replayed since the last call; a CPU has none and is not asked."""
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


def left_padding(left: list[int], length: int, device: torch.device) -> Tensor:
    """A mask whose rows begin with so much padding."""
    return (torch.arange(length) >= torch.tensor(left).unsqueeze(1)).long().to(device)


def assert_static_is_dynamic(model: Any, ids: Tensor, prompt: int, mask: Tensor | None, length: int) -> None:
    """The same logits, the same keys and values."""
    expected, dynamic = decode(model, ids, prompt, mask)
    logits, cache = decode(model, ids, prompt, mask, length)
    near = 1e-4  # of the contract: small random models amplify the rounding of another order of sums
    assert (logits - expected).abs().max() <= near
    assert isinstance(cache.layers[0], StaticLayerCache)
    cache.to_dynamic()
    real = slice(None) if mask is None else slice(int((1 - mask).sum(1).max()), None)
    for ours, its in zip(cache.layers, dynamic.layers, strict=True):
        for name in ("keys", "values"):
            assert (getattr(ours, name) - getattr(its, name))[:, :, real].abs().max() <= near


@every_static
@settings(max_examples=examples(4))
@given(data=st.data())
def test_static_is_dynamic(case: Case, device: torch.device, data: st.DataObject) -> None:
    """Rows, padding, short prompts."""
    rows, prompt, more = (data.draw(st.integers(1, most)) for most in (3, 12, 5))
    left = data.draw(st.lists(st.integers(0, prompt - 1), min_size=rows, max_size=rows))
    mask = left_padding(left, prompt + more, device) if data.draw(st.booleans()) else None
    ids = tokens(rows, prompt + more, seed=data.draw(st.integers(0, 9))).to(device)
    assert_static_is_dynamic(model_of(case, device), ids, prompt, mask, prompt + more + data.draw(st.integers(0, 9)))


@on_devices([(EVERY_KEY, False), (Case("mod", "qwen2"), False)], [EVERY_KEY])
@pytest.mark.parametrize("rows", [1, 3])
def test_with_triton_kernels(case: Case, device: torch.device, rows: int, replays: Callable[[int], None]) -> None:
    """The kernels that read who enters; in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    model, ids = case.fresh(kv_tokens="all").to(device), tokens(rows, 14).to(device)
    model.model.use_triton_kernels()
    assert_static_is_dynamic(model, ids, 11, None, 20)
    replays(3)
    assert_static_is_dynamic(model, ids, 11, left_padding(list(range(rows)), 14, device), 20)
    replays(3)


@one_case
@pytest.mark.parametrize(("sinks", "attention"), [(14, "sdpa"), (1, "eager")])
def test_sinks_and_other_attention(
    case: Case, device: torch.device, sinks: int, attention: str, replays: Callable[[int], None]
) -> None:
    """Sinks of short texts come among the decoded tokens."""
    model = case.fresh(sink_tokens=sinks).to(device)
    model.set_attn_implementation(attention)
    assert_static_is_dynamic(model, tokens(2, 20, 4).to(device), 10, None, 20)
    replays(10)


@one_case
@torch.no_grad()
def test_bfloat16(case: Case, device: torch.device, replays: Callable[[int], None]) -> None:
    """Every token enters, so that no rounding moves one across a threshold."""
    model, ids = case.fresh().to(device, torch.bfloat16), tokens(2, 16).to(device)
    with model.routing_mode("threshold", 1.0):
        expected, _ = decode(model, ids, 10)
        logits, _ = decode(model, ids, 10, None, 20)
    replays(6)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).float().abs().max() <= 0.05 * expected.float().abs().max()


@every_static
@torch.no_grad()
def test_nothing_moves_and_nobody_waits(case: Case, device: torch.device) -> None:
    model, ids = model_of(case, device), tokens(2, 30).to(device)
    cache, mask = RoutedCache(model.config, 40), torch.ones_like(ids)
    model(ids[:, :20], **{CACHE_NAME: cache})
    model(ids[:, 20:21], **{CACHE_NAME: cache})
    places = [(x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape) for x in cache.layers]
    with noting_waits(device) as waits:
        for n in range(21, 26):
            model(ids[:, n : n + 1], **{CACHE_NAME: cache})
        for n in range(26, 30):
            model(ids[:, n : n + 1], attention_mask=mask[:, : n + 1], **{CACHE_NAME: cache})
    assert waits == []
    assert places == [(x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape) for x in cache.layers]
    assert cache.get_seq_length() == 30


class Listed(TorchDispatchMode):
    """Operations and the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append(f"{func._schema.name} {tuple(getattr(out, 'shape', ()))}")
        return out


@torch.no_grad()
def test_the_operations_are_the_same_for_every_token() -> None:
    """A graph replays what was captured: nothing may depend on how many tokens there are, or on who enters."""
    model, ids = EVERY_KEY.on(), tokens(1, 40)
    cache = RoutedCache(model.config, 40)
    model(ids[:, :10], **{CACHE_NAME: cache})
    steps: set[tuple[str, ...]] = set()
    for n in range(10, 40):
        with Listed() as listed:
            model(ids[:, n : n + 1], **{CACHE_NAME: cache})
        steps.add(tuple(listed.operations))
    assert len(steps) <= 2  # the first one copies the keys to their places


@one_case
@torch.no_grad()
def test_crop_reorder_and_several_tokens_at_once(
    case: Case, device: torch.device, replays: Callable[[int], None]
) -> None:
    model, ids = case.on(device), tokens(2, 50).to(device)
    results = []
    for length in (None, 64):
        _, cache = decode(model, ids[:, :26], 20, None, length)
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0], device=device))
        ends = [*range(24, 31), 37, 38, 39, 40]  # several at once, as assisted decoding does
        chunks = [ids.flip(0)[:, start:end] for start, end in pairwise(ends)]
        results.append(torch.cat([model(chunk, **{CACHE_NAME: cache}).logits.clone() for chunk in chunks], dim=1))
        assert cache.get_seq_length() == 40
        replays(0 if length is None else 6 + 6 + 3)
    assert (results[0] - results[1]).abs().max() <= 1e-4


@one_case
@torch.no_grad()
def test_a_step_follows_thresholds_and_capacity(case: Case, device: torch.device) -> None:
    """They may change while a text is continued: a graph must not go on with those that it was captured with."""
    model, ids, results = case.on(device), tokens(1, 30).to(device), []
    for length in (None, 40):
        logits, cache = decode(model, ids[:, :21], 20, None, length)
        steps = [logits]
        for n in range(21, 30):
            with model.routing_mode("threshold", 1.0 if n < 25 else 0.5):
                steps.append(model(ids[:, n : n + 1], **{CACHE_NAME: cache}).logits.clone())
        results.append(torch.cat(steps, dim=1))
    assert (results[0] - results[1]).abs().max() <= 1e-4


@one_case
@torch.no_grad()
def test_logits_are_the_callers_own(case: Case, device: torch.device) -> None:
    """Those of a token stay what they are when the next one is decoded."""
    model, ids = case.on(device), tokens(1, 12).to(device)
    cache = RoutedCache(model.config, 20)
    model(ids[:, :10], **{CACHE_NAME: cache})
    first = model(ids[:, 10:11], **{CACHE_NAME: cache}).logits
    kept = first.clone()
    model(ids[:, 11:12], **{CACHE_NAME: cache})
    assert torch.equal(first, kept)


@every_static
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
def test_generate(case: Case, device: torch.device, how: dict[str, Any], replays: Callable[[int], None]) -> None:
    """With padding on the left; two texts, one after the other."""
    model = model_of(case, device)
    for seed in range(2):
        ids = tokens(2, 9, seed).to(device)
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": left_padding([0, 1], 9, device), **how}
        texts = []
        for static in ({}, {"cache_implementation": "static"}):
            torch.manual_seed(3)
            texts.append(model.generate(ids, pad_token_id=0, **options, **static))
            replays(11 if static else 0)
        assert torch.equal(*texts)


def test_what_cannot_be_static_is_refused() -> None:
    for fields in ({"kv_tokens": "routed", "score": "update_size"}, {"kv_tokens": "all"}):
        model: Any = routed_model("llama", "dtf", 0.5, **fields)
        with pytest.raises(ValueError, match="score of the token alone"):
            model.generate(tokens(1, 5), max_new_tokens=2, cache_implementation="static")
    model = EVERY_KEY.on()
    with pytest.raises(ValueError, match="choose 'static'"):
        model.generate(tokens(1, 5), max_new_tokens=2, cache_implementation="quantized")
    cache = RoutedCache(model.config, 10)
    with torch.no_grad():
        model(tokens(1, 9), **{CACHE_NAME: cache})
        model(tokens(1, 1), **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="made for 10 positions"):
            model(tokens(1, 1), **{CACHE_NAME: cache})


@on_devices([(EVERY_KEY, False), (Case("mod, every key, soft", "llama"), False)], [EVERY_KEY])
def test_layers_compile_whole(case: Case, device: torch.device) -> None:
    """As for a GPU, where few operations matter; each kind of layer without a graph break."""
    model, ids = case.fresh(kv_tokens="all").to(device), tokens(1, 16).to(device)
    expected, _ = decode(model, ids, 10)
    compile_layers(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    torch._dynamo.reset()  # layers of other models count, too
    torch._dynamo.utils.counters.clear()
    logits, _ = decode(model, ids, 10, None, 20)
    assert (logits - expected).abs().max() <= 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # a dense layer, a routed one, …
    assert not torch._dynamo.utils.counters["graph_break"]
