"""quality.md 7, 13: matrix products of few gathered rows take another way and come to the same."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dtfcli.models import products
from dtfcli.models.products import FEW_ROWS, products_of_few_rows
from tests.budget import examples
from tests.tiny import ARCHITECTURES, FAMILIES, dense_model, shared_routed_model, tokens

pytestmark = pytest.mark.skipif(products._ONE_DNN is None, reason="torch without oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that oneDNN did."""
    seen: list[int] = []
    multiply = products._ONE_DNN

    def watched(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.shape[:-1].numel())
        return multiply(x, *rest)

    monkeypatch.setattr(products, "_ONE_DNN", watched)
    return seen


@contextmanager
def left_to_mkl() -> Iterator[None]:
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


@given(data=st.data())
@settings(max_examples=examples(60))
def test_products_agree(data: st.DataObject) -> None:
    rows, tokens_, inner, outer = (data.draw(st.integers(1, most)) for most in (3, 9, 70, 70))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    x = torch.randn(rows, tokens_, inner)
    if data.draw(st.booleans()):  # not contiguous
        x = torch.randn(inner, tokens_, rows).permute(2, 1, 0)
    if data.draw(st.booleans()):
        x = x[0]
    weight = torch.nn.Parameter(torch.randn(outer, inner))
    bias = torch.randn(outer) if data.draw(st.booleans()) else None
    with torch.inference_mode() if data.draw(st.booleans()) else torch.no_grad():
        with products_of_few_rows(x.contiguous()):
            ours = F.linear(x, weight, bias)
        torch.testing.assert_close(ours, F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
    assert ours.is_contiguous()


def test_only_float32_of_few_rows_without_gradient(calls: list[int]) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))

    def count(x: torch.Tensor, of: torch.Tensor = weight) -> int:
        calls.clear()
        with products_of_few_rows(x):
            F.linear(x, of)
        return len(calls)

    few = torch.randn(2, FEW_ROWS // 2, 8)
    assert count(few) == 0  # with a gradient
    with torch.no_grad():
        assert count(few) == 1
        assert count(torch.randn(1, FEW_ROWS + 1, 8)) == 0
        assert count(few.bfloat16(), weight.bfloat16()) == 0
        assert count(few.double(), weight.double()) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert count(few) == 0
        with left_to_mkl():
            assert count(few) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gathered_tokens_alone(family: str, architecture: str, calls: list[int]) -> None:
    model, ids = shared_routed_model(family, architecture), tokens(2, 40)
    calls.clear()
    with torch.no_grad():
        out = model(ids, output_routing=True)
        used = list(calls)
        with left_to_mkl():
            plain = model(ids)
        torch.testing.assert_close(out.logits, plain.logits, atol=1e-4, rtol=1e-5)
        calls.clear()
        dense_model(family)(ids)
        model(ids[:1, :1])  # a sink: every token of the pass enters
    products_each = 7  # queries, keys, values, output; gate, up, down
    widest = [int(record.selected.sum(1).max()) for record in out.routing]
    assert used == [rows for slots in widest for rows in [2 * slots] * products_each]
    assert calls == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_position_whose_logits_are_read(architecture: str, calls: list[int]) -> None:
    model, ids = shared_routed_model("qwen2", architecture), tokens(2, 40)
    every = model(ids, use_cache=False)
    in_layers = len(calls)
    calls.clear()
    last = model(ids, logits_to_keep=1)
    assert len(calls) == in_layers + 1
    assert calls[-1] == 2  # one position of each row, by the head
    torch.testing.assert_close(last.logits, every.logits[:, -1:], atol=1e-4, rtol=1e-5)
    calls.clear()
    only_sinks = model(ids[:, :1], logits_to_keep=1)  # nothing is left out: that is decoding's shape
    assert only_sinks.logits.shape[1] == 1
    assert calls == []


@pytest.mark.parametrize("mode", ["threshold", "topk"])
@torch.no_grad()
def test_a_model_that_routes_everything_is_left_alone(mode: str, calls: list[int]) -> None:
    model, ids = shared_routed_model("qwen2", "dtf"), tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    calls.clear()
    with model.routing_mode(mode, 1.0):
        for kept in (0, 1):
            ours, stock = (m(ids, use_cache=False, logits_to_keep=kept) for m in (model, dense_model("qwen2")))
            assert torch.equal(ours.logits, stock.logits)
        model(ids, attention_mask=mask)
    assert calls == []


def test_counted_by_torch(calls: list[int]) -> None:
    model, ids = shared_routed_model("llama", "mod"), tokens(1, 30)
    calls.clear()
    counts = []
    for way in (nullcontext, left_to_mkl):
        with torch.no_grad(), way(), FlopCounterMode(display=False) as counter:
            model(ids)
        counts.append(counter.get_total_flops())
    assert calls
    assert counts[0] == counts[1] > 0


def test_a_saved_copy_of_the_code_loads_beside_it() -> None:
    """Every model that is loaded with `trust_remote_code` brings its own."""
    spec = spec_from_file_location("a_copy_of_products", products.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.FEW_ROWS == FEW_ROWS


@torch.no_grad()
def test_gradients_switched_on_inside_a_block(calls: list[int]) -> None:
    x, weight = torch.randn(1, 4, 8, requires_grad=True), torch.nn.Parameter(torch.randn(8, 8))
    with products_of_few_rows(x), torch.enable_grad():
        F.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert calls == []
