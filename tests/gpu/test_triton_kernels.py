"""The Triton kernel on a GPU equals its naive twin in the shapes of real models; in a rehearsal in small ones.

More shapes and layouts are drawn at random in `tests.models.test_triton_kernels`, for the interpreter.
"""

import pytest
import torch
from torch import Tensor

from dtfcli.models import triton_kernels
from dtfcli.models.static import EnteredRows

pytestmark = pytest.mark.gpu

SHAPES = [(896, 4864), (4864, 896), (3584, 18944), (18944, 3584)]
"""Inputs and outputs of the MLPs of Qwen2.5-0.5B and 7B."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _with_triton() -> None:
    pytest.importorskip("triton", reason="these are its kernels")


def shape_on(device: torch.device, shape: tuple[int, int]) -> tuple[int, int]:
    """The interpreter takes minutes for what a GPU does in microseconds."""
    size, width = shape
    return shape if device.type == "cuda" else (size // 64, width // 64 + 1)


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def number(count: int, device: torch.device) -> Tensor:
    return torch.tensor(count, dtype=torch.int32, device=device)


def assert_near(ours: Tensor, twins: Tensor) -> None:
    """Apart by no more than the dtype's tolerance, relative to the largest value."""
    assert ours.dtype == twins.dtype
    torch.testing.assert_close(ours, twins, rtol=0.0, atol=TOLERANCE[ours.dtype] * float(twins.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_counted_is_naive(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """One row, a batch, a whole block of rows; what is beyond the count is NaN. Few kinds: each is compiled first."""
    assert triton_kernels.available(torch.zeros(1, device=device))
    torch.manual_seed(0)
    size, width = shape_on(device, shape)
    weight, bias = normal(device, dtype, width, size), normal(device, dtype, width)
    for rows, entering in ((1, 1), (5, 5), (5, 2), (64, 48)):
        x = normal(device, dtype, rows, size)
        x[entering:] = torch.nan
        count = number(entering, device)
        added = bias if entering < rows or rows == 1 else None
        ours, twins = (
            of(x, weight, added, count) for of in (triton_kernels.counted_linear, triton_kernels.counted_linear_naive)
        )
        assert_near(ours, twins)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_what_nobody_enters_is_not_read(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    size, width = shape_on(device, SHAPES[0])
    x, weight = (torch.full((n, size), torch.nan, dtype=dtype, device=device) for n in (rows, width))
    nobody, nothing = number(0, device), torch.zeros(rows, width, dtype=dtype, device=device)
    assert torch.equal(triton_kernels.counted_linear(x, weight, weight[:, 0].contiguous(), nobody), nothing)
    assert torch.equal(triton_kernels.counted_linear(x, weight, None, nobody), nothing)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@torch.no_grad()
def test_entered_rows(dtype: torch.dtype, device: torch.device) -> None:
    """Linear maps inside of it: as ever if any row enters, zeros without a look at the weights if none does."""
    size, width = shape_on(device, SHAPES[0])
    linear = torch.nn.Linear(size, width, device=device, dtype=dtype)
    for rows in (1, 5):
        x = normal(device, dtype, rows, 1, size)
        some = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        some[-1] = True
        with EnteredRows(some):
            ours = linear(x)
        assert_near(ours, linear(x))
        weight = linear.weight.clone()
        linear.weight.fill_(torch.nan)
        with EnteredRows(~some if rows == 1 else torch.zeros_like(some)):
            assert torch.equal(linear(x), torch.zeros_like(ours))
        linear.weight.copy_(weight)
