"""Decoding in fixed shapes says what decoding says: for a GPU that replays the same step for every token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.models.static import EnteredRows, StaticLayerCache
from dtfcli.training.compiling import compile_layers
from tests.budget import examples
from tests.contract.test_no_waiting import Watched
from tests.contract.test_no_waiting import watched as watched  # a fixture
from tests.tiny import routed_model, shared_routed_model, tokens

CASES: dict[str, dict[str, Any]] = {
    "mod": {"architecture": "mod"},
    "random": {"architecture": "random"},
    "mod, forecast, soft gate": {"architecture": "mod", "bypass": "forecast", "gate": "soft"},
    "update size": {"score": "update_size"},
    "forecast error": {"score": "forecast_error", "bypass": "forecast"},
    "forecast error, one budget": {"score": "forecast_error", "bypass": "forecast", "budget": "model"},
    "forecast error of an MLP": {"score": "forecast_error", "bypass": "forecast", "routed_part": "mlp"},
    "forecast error of attention": {"score": "forecast_error", "bypass": "forecast", "routed_part": "attention"},
    "sinks": {"score": "update_size", "sink_tokens": 8},
    "eager attention": {"score": "update_size"},
}


def _model(name: str, family: str = "llama") -> Any:
    fields = dict(CASES[name])
    model: Any = shared_routed_model(family, fields.pop("architecture", "dtf"), kv_tokens="all", **fields)
    model.set_attn_implementation("eager" if name.startswith("eager") else "sdpa")
    return model


@torch.no_grad()
def _decode(model: Any, ids: Tensor, prompt: int, mask: Tensor | None, length: int | None) -> tuple[Tensor, Any]:
    """Logits of the tokens after the prompt, one by one; and the cache."""
    cache, logits = RoutedCache(model.config, length), []
    model(ids[:, :prompt], attention_mask=None if mask is None else mask[:, :prompt], **{CACHE_NAME: cache})
    for n in range(prompt, ids.shape[1]):
        seen = None if mask is None else mask[:, : n + 1]
        logits.append(model(ids[:, n : n + 1], attention_mask=seen, **{CACHE_NAME: cache}).logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=examples(4), deadline=None)
@given(data=st.data())
def test_static_is_growing(name: str, family: str, data: st.DataObject) -> None:
    """Rows, padding, short prompts."""
    _check(_model(name, family), False, data)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("part", ["block", "mlp", "attention"])
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_static_with_kernels_is_growing(part: str, family: str, data: st.DataObject) -> None:
    """With the kernels that look at who enters, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    name = "forecast error" if part == "block" else f"forecast error of {'an MLP' if part == 'mlp' else part}"
    _check(_model(name, family), True, data)


def _check(model: Any, kernels: bool, data: st.DataObject) -> None:
    rows, prompt = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    left = data.draw(st.lists(st.integers(0, prompt - 1), min_size=rows, max_size=rows))
    more = data.draw(st.integers(1, 5))
    mask = (torch.arange(prompt + more) >= torch.tensor(left).unsqueeze(1)).long() if data.draw(st.booleans()) else None
    ids = tokens(rows, prompt + more, seed=data.draw(st.integers(0, 9)))
    expected, growing = _decode(model, ids, prompt, mask, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "triton_kernels", kernels)  # as `use_triton_kernels`, and back
        logits, cache = _decode(model, ids, prompt, mask, prompt + more + data.draw(st.integers(0, 9)))
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(cache.layers[0], StaticLayerCache)
    cache.to_dynamic()
    for ours, its in zip(cache.layers, growing.layers, strict=True):
        assert torch.allclose(ours.keys, its.keys, rtol=1e-5, atol=1e-5)
        assert torch.allclose(ours.values, its.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_nothing_moves_and_nobody_waits(name: str, watched: Watched) -> None:
    model = _model(name)
    ids = tokens(2, 30)
    cache = RoutedCache(model.config, 40)
    model(ids[:, :20], **{CACHE_NAME: cache})
    model(ids[:, 20:21], **{CACHE_NAME: cache})
    places = [(x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape) for x in cache.layers]
    watched.waits.clear()
    with watched:
        for n in range(21, 30):
            model(ids[:, n : n + 1], **{CACHE_NAME: cache})
    assert watched.waits == []
    assert places == [(x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape) for x in cache.layers]
    assert cache.get_seq_length() == 30
    assert int(cache.static.position) == 30


@torch.no_grad()
def test_the_operations_are_the_same_for_every_token(watched: Watched) -> None:
    """A graph replays what was captured: nothing may depend on how many tokens there are, or on who enters."""
    model, ids = _model("forecast error"), tokens(1, 40)
    cache = RoutedCache(model.config, 40)
    model(ids[:, :10], **{CACHE_NAME: cache})
    seen: set[tuple[Any, ...]] = set()

    class Listed(Watched):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.waits.append(f"{func._schema.name} {tuple(getattr(out, 'shape', ()))}")
            return out

    for n in range(10, 40):
        with Listed() as listed:
            model(ids[:, n : n + 1], **{CACHE_NAME: cache})
        seen.add(tuple(listed.waits))
    assert len(seen) <= 2  # the first one copies the keys to their places


@torch.no_grad()
def test_crop_reorder_and_several_tokens_at_once() -> None:
    model, ids = _model("forecast error"), tokens(2, 50)
    found = []
    for length in (None, 64):
        cache = RoutedCache(model.config, length)
        model(ids[:, :20], **{CACHE_NAME: cache})
        for n in range(20, 26):
            model(ids[:, n : n + 1], **{CACHE_NAME: cache})
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        logits = [model(ids.flip(0)[:, n : n + 1], **{CACHE_NAME: cache}).logits for n in range(24, 30)]
        logits.append(model(ids.flip(0)[:, 30:37], **{CACHE_NAME: cache}).logits)  # as assisted decoding does
        logits += [model(ids.flip(0)[:, n : n + 1], **{CACHE_NAME: cache}).logits for n in range(37, 40)]
        assert cache.get_seq_length() == 40
        found.append(torch.cat(logits, dim=1))
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams: int) -> None:
    model, ids = _model("forecast error"), tokens(2, 9)
    how = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, cache_implementation="static", **how))


def test_what_cannot_be_static_is_refused() -> None:
    for fields in ({"kv_tokens": "routed", "score": "update_size"}, {"kv_tokens": "all"}):
        model: Any = routed_model("llama", "dtf", 0.5, **fields)
        with pytest.raises(ValueError, match="score of the token alone"):
            model.generate(tokens(1, 5), max_new_tokens=2, cache_implementation="static")
    model = _model("forecast error")
    with pytest.raises(ValueError, match="choose 'static'"):
        model.generate(tokens(1, 5), max_new_tokens=2, cache_implementation="quantized")
    cache = RoutedCache(model.config, 10)
    with torch.no_grad():
        model(tokens(1, 9), **{CACHE_NAME: cache})
        model(tokens(1, 1), **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="made for 10 positions"):
            model(tokens(1, 1), **{CACHE_NAME: cache})


def test_a_layer_that_no_row_enters_reads_no_weights() -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    linear = torch.nn.Linear(32, 48)
    torch.nn.init.constant_(linear.weight, torch.nan)
    x = torch.randn(3, 1, 32)
    with torch.no_grad(), EnteredRows(torch.zeros(3, 1, dtype=torch.bool)):
        assert torch.equal(linear(x), torch.zeros(3, 1, 48))
    torch.nn.init.normal_(linear.weight)
    with torch.no_grad(), EnteredRows(torch.tensor([[False], [True], [False]])):
        assert torch.allclose(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mod", "forecast error", "forecast error of an MLP", "forecast error of attention"])
def test_layers_compile_whole(name: str) -> None:
    """As for a GPU, where few operations matter; each kind of layer without a graph break."""
    fields = dict(CASES[name])
    model: Any = routed_model("llama", fields.pop("architecture", "dtf"), 0.5, kv_tokens="all", **fields)
    ids = tokens(1, 16)
    expected, _ = _decode(model, ids, 10, None, 20)
    compile_layers(model, backend="aot_eager")
    torch._dynamo.reset()  # layers of other models count, too
    torch._dynamo.utils.counters.clear()
    logits, _ = _decode(model, ids, 10, None, 20)
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # a dense layer, a routed one, …
    assert not torch._dynamo.utils.counters["graph_break"]
