"""Models and rows that the tests on a GPU share: the same weights on the CPU and on the device."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.models.conversion import convert
from dtfcli.training.objectives import Objective
from tests.near import near_tie
from tests.tiny import FAMILIES, OPTIONS, dense_model, pad, tokens

CASES: dict[str, dict[str, Any]] = {
    "dtf": {},
    "dtf, every key": {"kv_tokens": "all"},
    "mod": {"architecture": "mod"},
    "mod, every key": {"architecture": "mod", "kv_tokens": "all"},
    "random": {"architecture": "random"},
    "layerdrop": {"architecture": "layerdrop"},
} | OPTIONS
every_case = pytest.mark.parametrize("case", CASES)
LOOKS = (True, False, None)
LENGTHS = (31, 24, 9, 1)


def build(case: str, family: str = "llama", **fields: Any) -> Any:
    """A converted model in eval mode on the CPU, calibrated at its own γ; forecasts and scores say something."""
    model: Any = convert(dense_model(family), **CASES[case] | fields)
    for name, parameter in model.named_parameters():
        if "forecast" in name or name.endswith("router.w_out"):
            torch.nn.init.normal_(parameter, std=0.1 if "linear" in name else 0.2)
    model.calibrate([{"input_ids": tokens(16, 48, seed=7)}], capacities=())
    return model


@cache
def reference(case: str) -> Any:
    """The model of a case on the CPU in float32, one family or the other; do not change it."""
    return build(case, FAMILIES[list(CASES).index(case) % 2])


@cache
def on_device(case: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of `reference`; leave it as it was."""
    return copy.deepcopy(reference(case)).to(device=device, dtype=dtype)


def padded_rows() -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows [1, T] of several lengths; all together with padding on either side, and their mask."""
    alone = [tokens(1, length, seed) for seed, length in enumerate(LENGTHS)]
    width = max(LENGTHS) + 2
    padded = [pad(row[0], left, width - left - row.shape[1]) for row, left in zip(alone, (2, 9, 0, 32), strict=True)]
    input_ids, mask = (torch.stack(parts) for parts in zip(*padded, strict=True))
    return alone, input_ids, mask


@torch.no_grad()
def settled(model: Any, rows: list[Tensor]) -> list[int]:
    """The rows in which no routing decision of this model hangs on next to nothing: two devices must agree on them."""
    found = [place for place, row in enumerate(rows) if not near_tie(model, row)]
    assert 2 * len(found) >= len(rows), "too few rows are left to compare"
    return found


@torch.no_grad()
def in_chunks(model: Any, ids: Tensor, mask: Tensor | None, ends: tuple[int, ...]) -> Tensor:
    """Logits [B, T, V] with a cache, in chunks that end at these places and at the last token."""
    cache, places = RoutedCache(model.config), sorted({0, ids.shape[1], *(end for end in ends if end < ids.shape[1])})
    logits = [
        model(
            ids[:, start:end], attention_mask=None if mask is None else mask[:, :end], **{CACHE_NAME: cache}
        ).logits.clone()
        for start, end in pairwise(places)
    ]
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(logits, dim=1)


@torch.no_grad()
def decode(model: Any, ids: Tensor, prompt: int, mask: Tensor | None, length: int | None) -> tuple[Tensor, RoutedCache]:
    """Logits of the tokens after the prompt, one by one; and the cache."""
    cache, logits = RoutedCache(model.config, length), []
    model(ids[:, :prompt], attention_mask=None if mask is None else mask[:, :prompt], **{CACHE_NAME: cache})
    for n in range(prompt, ids.shape[1]):
        seen = None if mask is None else mask[:, : n + 1]
        logits.append(model(ids[:, n : n + 1], attention_mask=seen, **{CACHE_NAME: cache}).logits.clone())
    return torch.cat(logits, dim=1), cache


def losses_and_gradients(model: Any, ids: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loss and every parameter's gradient by name, on the CPU in float32; under autocast to a half precision."""
    objective = Objective(model).train()
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        loss = objective(ids, ids[:, 1:].numel()).loss
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach().cpu()}


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """The same names, and tensors no further apart than a share of the largest element and a little; NaN is NaN."""
    assert found.keys() == expected.keys()
    apart = {}
    for name, theirs in expected.items():
        ours = found[name].detach().cpu()
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        difference = float(torch.where(same, 0.0, (ours - theirs).abs()).max())
        largest = float(torch.where(theirs.isfinite(), theirs, 0.0).abs().max())
        if not difference <= tolerance * (0.01 + largest):
            apart[name] = difference, largest
    assert not apart


@contextmanager
def noting_waits(device: torch.device) -> Iterator[list[str]]:
    """Fills the list with the places at which the host waited for the device, when it is left; a CPU has none."""
    places: list[str] = []
    if device.type == "cpu":
        yield places
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield places
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places += [f"{x.filename}:{x.lineno}" for x in caught if "called a synchronizing" in str(x.message)]
