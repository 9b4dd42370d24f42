"""The Triton kernel is its naive twin, and reads nothing that does not count: what must not be read is NaN here.

On a CPU Triton's interpreter runs it. The interpreter cuts bfloat16 off where a GPU rounds, so the tolerance there is a
whole unit in the last place.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.budget import examples

pytest.importorskip("triton", reason="Triton is not installed: these are its kernels")

from dtfcli.models.static import EnteredRows
from dtfcli.models.triton_kernels import available, counted_linear, counted_linear_naive

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LAYOUTS = ["plain", "slice", "transposed"]
SHAPES = [(896, 4864), (4864, 896), (3584, 18944), (18944, 3584)]
"""Inputs and outputs of the MLPs of Qwen2.5-0.5B and 7B; the interpreter takes a small part of them."""
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def matrix(device: torch.device, dtype: torch.dtype, rows: int, columns: int, layout: str = "plain") -> Tensor:
    """Random [rows, columns] in a layout."""
    if layout == "transposed":
        return torch.randn(columns, rows).to(device, dtype).T
    if layout == "slice":
        return torch.randn(rows + 2, columns + 3).to(device, dtype)[1:-1, 2:-1]
    return torch.randn(rows, columns).to(device, dtype)


def counter(count: int, device: torch.device, dims: int = 0) -> Tensor:
    return torch.full((1,) * dims, count, dtype=torch.int32, device=device)


def assert_near(ours: Tensor, twins: Tensor) -> None:
    """Apart by no more than the dtype's tolerance, relative to the largest value."""
    assert ours.dtype == twins.dtype
    assert ours.shape == twins.shape
    most = TOLERANCE[ours.dtype] * float(twins.detach().abs().max()) if twins.numel() else 0.0
    torch.testing.assert_close(ours, twins, rtol=0.0, atol=most)


@on_both
@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    data=st.data(),
    size=st.integers(1, 80) | st.sampled_from([129, 300, 1030]),
    width=st.integers(1, 40),
    rows=st.just(1) | st.integers(1, 70),
)
@settings(max_examples=examples(10))
def test_it_is_its_naive_twin(
    device: torch.device, dtype: torch.dtype, layout: str, data: st.DataObject, size: int, width: int, rows: int
) -> None:
    """Rows beyond the count are NaN: they are not read."""
    assert available(torch.zeros(1, device=device)), "Triton was imported before TRITON_INTERPRET was set"
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    entering = data.draw(st.sampled_from([0, 1, rows]) | st.integers(0, rows))
    x = matrix(device, dtype, rows, size, data.draw(st.sampled_from(LAYOUTS)))
    x[entering:] = torch.nan
    weight = matrix(device, dtype, width, size, layout)
    bias = matrix(device, dtype, 1, width)[0] if data.draw(st.booleans()) else None
    count = counter(entering, device, data.draw(st.integers(0, 1)))
    y = counted_linear(x, weight, bias, count)
    assert_near(y, counted_linear_naive(x, weight, bias, count))
    assert not y[entering:].any()


@on_both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_shapes_of_real_models(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """One row, a batch, a whole block of rows. Weights that no row enters are NaN: they are not read."""
    torch.manual_seed(0)
    size, width = shape if device.type == "cuda" else (shape[0] // 64, shape[1] // 64 + 1)
    weight, bias = matrix(device, dtype, width, size), matrix(device, dtype, 1, width)[0]
    for rows, entering in ((1, 1), (5, 2), (64, 48)):
        x, count = matrix(device, dtype, rows, size), counter(entering, device)
        assert_near(counted_linear(x, weight, bias, count), counted_linear_naive(x, weight, bias, count))
        nothing, nobody = torch.zeros(rows, width, dtype=dtype, device=device), counter(0, device)
        assert torch.equal(counted_linear(x * torch.nan, weight * torch.nan, bias * torch.nan, nobody), nothing)


def test_the_edges() -> None:
    """A count beyond the rows, no rows at all, and gradients, which it has none of."""
    here = torch.device("cpu")
    x, weight = matrix(here, torch.float32, 6, 8), matrix(here, torch.float32, 3, 8)
    torch.testing.assert_close(counted_linear(x[:4], weight, None, counter(99, here)), x[:4] @ weight.T)
    assert counted_linear(x[:0], weight, None, counter(0, here)).shape == (0, 3)
    with pytest.raises(AssertionError, match="no backward"):
        counted_linear(x, weight.requires_grad_(), None, counter(2, here))


@on_both
@every_dtype
@torch.no_grad()
def test_linear_maps_of_rows_that_enter(dtype: torch.dtype, device: torch.device) -> None:
    """As ever if any row enters, zeros without reading the weights if none does."""
    linear = torch.nn.Linear(56, 76, device=device, dtype=dtype)
    for rows in (1, 5):
        x = torch.randn(rows, 1, 56, device=device).to(dtype)
        some = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        some[-1] = True
        with EnteredRows(some):
            ours = linear(x)
        assert_near(ours, linear(x))
        weight = linear.weight.clone()
        linear.weight.fill_(torch.nan)
        with EnteredRows(torch.zeros_like(some)):
            assert torch.equal(linear(x), torch.zeros_like(ours))
        linear.weight.copy_(weight)
