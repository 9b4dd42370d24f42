"""The Triton kernel = its naive twin; and what it promises not to do: read, wait, allocate.

On a GPU they run there, elsewhere in Triton's interpreter, which has to be asked for before Triton is first imported.
The interpreter cuts bfloat16 off where a GPU rounds, so the tolerance there is a whole unit in the last place.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.budget import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed: these are its kernels")

from dtfcli.models import triton_kernels  # noqa: E402  after the interpreter was asked for

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["plain", "slice", "transposed"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INNER = st.integers(1, 80) | st.sampled_from([129, 300, 1030])
ROWS = st.just(1) | st.integers(1, 70)


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "plain") -> Tensor:
    """Random [rows, columns], at a device and in a layout."""
    if layout == "transposed":
        return torch.randn(columns, rows).to(DEVICE, dtype).T
    if layout == "slice":
        return torch.randn(rows + 2, columns + 3).to(DEVICE, dtype)[1:-1, 2:-1]
    return torch.randn(rows, columns).to(DEVICE, dtype)


def counter(count: int, dims: int = 0) -> Tensor:
    return torch.full((1,) * dims, count, dtype=torch.int32, device=DEVICE)


def assert_near(ours: Tensor, twins: Tensor) -> None:
    """Apart by no more than the dtype's tolerance, relative to the largest value."""
    assert ours.dtype == twins.dtype
    assert ours.shape == twins.shape
    most = TOLERANCE[ours.dtype] * float(twins.detach().abs().max()) if twins.numel() else 0.0
    torch.testing.assert_close(ours, twins, rtol=0.0, atol=most)


def drawn_rows(data: st.DataObject, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states whose rows from a count on are NaN, and that count."""
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    rows = data.draw(ROWS)
    count = data.draw(st.sampled_from([0, 1, rows]) | st.integers(0, rows))
    x = matrix(rows, size, dtype, data.draw(st.sampled_from(LAYOUTS)))
    x[count:] = torch.nan
    return x, counter(count, data.draw(st.integers(0, 1)))


def test_they_can_run_here() -> None:
    assert triton_kernels.available(torch.zeros(1, device=DEVICE)), (
        "Triton was imported before TRITON_INTERPRET was set"
    )


@given(
    data=st.data(), size=INNER, width=st.integers(1, 40), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS)
)
@settings(max_examples=examples(40))
def test_counted_linear(data: st.DataObject, size: int, width: int, dtype: torch.dtype, layout: str) -> None:
    x, count = drawn_rows(data, size, dtype)
    weight = matrix(width, size, dtype, layout)
    bias = matrix(1, width, dtype)[0] if data.draw(st.booleans()) else None
    y = triton_kernels.counted_linear(x, weight, bias, count)
    assert_near(y, triton_kernels.counted_linear_naive(x, weight, bias, count))
    assert not y[int(count) :].any()


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_weights_do_not_matter_where_nobody_enters(rows: int, dtype: torch.dtype) -> None:
    x = torch.full((rows, 33), torch.nan, dtype=dtype, device=DEVICE)
    weight = torch.full((9, 33), torch.nan, dtype=dtype, device=DEVICE)
    y = triton_kernels.counted_linear(x, weight, weight[:, 0].contiguous(), counter(0))
    assert torch.equal(y, torch.zeros(rows, 9, dtype=dtype, device=DEVICE))


def test_a_count_beyond_the_rows_reads_no_further(reads: Any) -> None:
    whole = matrix(6, 20, torch.float32)
    weight = matrix(5, 20, torch.float32)
    torch.testing.assert_close(
        triton_kernels.counted_linear(whole[:4], weight, None, counter(99)), whole[:4] @ weight.T
    )
    assert not reads(whole)[4:].any()


def test_no_rows() -> None:
    y = triton_kernels.counted_linear(matrix(0, 8, torch.float32), matrix(3, 8, torch.float32), None, counter(0))
    assert y.shape == (0, 3)


def test_no_gradient_is_lost_in_silence() -> None:
    weight = matrix(3, 8, torch.float32).requires_grad_()
    with pytest.raises(AssertionError, match="no backward"):
        triton_kernels.counted_linear(matrix(2, 8, torch.float32), weight, None, counter(2))
    with torch.no_grad():
        triton_kernels.counted_linear(matrix(2, 8, torch.float32), weight, None, counter(2))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of a tensor: how often the interpreter read each of its elements."""
    if DEVICE != "cpu":
        pytest.skip("only the interpreter shows what is read")
    from triton.runtime import interpreter  # type: ignore[import, unused-ignore]

    addresses: list[Any] = []
    load = interpreter.InterpreterBuilder.create_masked_load

    def noted(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        addresses.extend(pointers.data[mask.data].tolist())
        return load(self, pointers, mask, *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", noted)

    def of(tensor: Tensor) -> Tensor:
        places = (torch.tensor(addresses, dtype=torch.int64) - tensor.data_ptr()).div(tensor.element_size()).long()
        inside = places[(places >= 0) & (places < tensor.numel())]
        return torch.bincount(inside, minlength=tensor.numel()).view(tensor.shape)

    return of


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_weights_are_read_once_or_not_at_all(reads: Any, rows: int, count: int) -> None:
    x, weight = (matrix(n, 300, torch.bfloat16) for n in (rows, 21))
    triton_kernels.counted_linear(x, weight, None, counter(count))
    assert torch.equal(reads(weight), torch.full_like(weight, min(count, 1), dtype=torch.int64))
    assert not reads(x)[count:].any()


def test_blocks_of_rows_without_any_read_no_weights(reads: Any) -> None:
    x, weight = matrix(130, 20, torch.float32), matrix(5, 20, torch.float32)
    triton_kernels.counted_linear(x, weight, None, counter(65))
    assert torch.equal(reads(weight), torch.full_like(weight, 2, dtype=torch.int64))  # two of three blocks of 64


class Operations(TorchDispatchMode):
    """The names of all of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operations]:
    """What the host does around the kernels, which do not run (the interpreter would be seen at work)."""

    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: None

    with monkeypatch.context() as patch, Operations() as operations:
        for name in ("_vector_kernel", "_matrix_kernel"):
            patch.setattr(triton_kernels, name, Nothing())
        yield operations


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_host_allocates_the_output_and_launches(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    x, weight, count = matrix(rows, 20, torch.float32, "transposed"), matrix(5, 20, torch.float32), counter(1)
    bias = torch.randn(5, device=DEVICE)
    with host_operations(monkeypatch) as operations:
        triton_kernels.counted_linear(x, weight, bias, count)
    assert operations.names == ["aten::new_empty"]
