"""The cases of the contract: ways of choosing tokens × backbones, and random batches for them.

A new way of choosing is one row of `WAYS`, a new backbone one of `tiny.BACKBONES`.
"""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.models.configuration_fields import WAYS as FIELDS
from dtfcli.models.configuration_fields import way_of
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM
from tests import near
from tests.tiny import BACKBONES, pad, shared_routed_model, tokens

WAYS: dict[str, dict[str, Any]] = {
    "surprise": {},
    "surprise, every key": {"kv_tokens": "all"},
    "surprise, every key, forecast": {"kv_tokens": "all", "bypass": "forecast"},
    "mod": {"architecture": "mod"},
    "mod, every key, soft": {"architecture": "mod", "kv_tokens": "all", "gate": "soft"},
    "mod, forecast, no sinks": {"architecture": "mod", "bypass": "forecast", "sink_tokens": 0},
    "mod by a predictor": {"architecture": "mod", "predictor_loss_weight": 0.01, "routing": "predictor"},
    "update size": {"score": "update_size"},
    "update size, every key": {"score": "update_size", "kv_tokens": "all"},
    "forecast error": {"score": "forecast_error", "bypass": "forecast"},
    "forecast error, every key": {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"},
    "random, three sinks": {"architecture": "random", "sink_tokens": 3},
    "random, every key": {"architecture": "random", "kv_tokens": "all"},
    "layerdrop": {"architecture": "layerdrop"},
    "layerdrop, forecast": {"architecture": "layerdrop", "bypass": "forecast"},
}
"""What ranks tokens, whose keys they see, and what they take instead."""
OF_MLPS: dict[str, dict[str, Any]] = {
    "MLPs": {"routed_part": "mlp"},
    "MLPs by chance": {"architecture": "random", "routed_part": "mlp"},
    "MLPs, all or none": {"architecture": "layerdrop", "routed_part": "mlp"},
}
"""Routed MLPs: of stock models, with stock caches, by threshold alone."""
QUICK = ("MLPs", "surprise", "mod", "forecast error, every key", "update size", "layerdrop")
"""The ways that `make test` tries; `make test-all` tries the others, too."""
CPU = torch.device("cpu")
REHEARSED = os.environ.get("DTF_REHEARSE_GPU") == "1"  # read now: tests lose the variables that are no settings


def gpu() -> torch.device:
    """CUDA; in a rehearsal (DTF_REHEARSE_GPU=1) the CPU, so that a typing error does not cost a lent GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not REHEARSED:
        pytest.skip("torch finds no CUDA device here; DTF_REHEARSE_GPU=1 tries these tests on the CPU")
    return CPU


@contextmanager
def exact() -> Iterator[None]:
    """Products of float32 in float32; one thread, for the models are small; two devices part sooner than one does."""
    torch.set_num_threads(1)
    before, near.NEAR = near.NEAR, 1e-4
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        near.NEAR = before
        torch.set_float32_matmul_precision(precision)


class Case(NamedTuple):
    """A way of choosing on a backbone."""

    way: str
    family: str

    def __str__(self) -> str:
        return f"{self.way}, {self.family}"

    @property
    def fields(self) -> dict[str, Any]:
        """What `convert` is given."""
        return {"architecture": "dtf"} | (WAYS | OF_MLPS)[self.way]

    @property
    def mode(self) -> str:
        """The causal mode."""
        return self.fields.get("routing", "threshold")

    @property
    def modes(self) -> tuple[str, ...]:
        """Those in which every token enters at γ = 1."""
        return ("threshold",) if self.way in OF_MLPS else ("threshold", "topk")

    @property
    def chooses_tokens(self) -> bool:
        """Whether it chooses tokens, and not layers."""
        return self.fields["architecture"] != "layerdrop"

    @property
    def learns_updates(self) -> bool:
        """Whether training compares updates with what it predicted, and explores."""
        return self.fields.get("bypass") == "forecast" or FIELDS[way_of(self.fields)].learns_from_updates

    def on(self, device: torch.device = CPU, **fields: Any) -> Any:
        """The model, calibrated at γ = 0.5 and on the grid; shared, so do not change it."""
        return _on(self, device, **fields)

    def fresh(self, **fields: Any) -> Any:
        """A model of one's own."""
        return copy.deepcopy(self.on(**fields))


@cache
def _on(case: Case, device: torch.device, **fields: Any) -> Any:
    if device.type == "cpu":
        return shared_routed_model(case.family, **case.fields | fields)
    return copy.deepcopy(case.on(**fields)).to(device)


def _cases(offsets: tuple[int, ...], ways: Iterable[str] = WAYS) -> list[tuple[Case, bool]]:
    """Each way on a few backbones, in turn, so that every backbone meets several ways; whether it is a quick one."""
    families = list(BACKBONES)
    return [
        (Case(way, families[(place + offset) % len(families)]), way in QUICK and offset == 0)
        for place, way in enumerate(ways)
        for offset in offsets
    ]


def on_devices(cases: list[tuple[Case, bool]], on_gpu: list[Case]) -> Any:
    """Parametrized by `case` and `device`: cases on a CPU, each with whether it is quick; some of them on a GPU."""
    here = [pytest.param(case, "cpu", marks=_marks(quick), id=str(case)) for case, quick in cases]
    there = [pytest.param(case, "cuda", marks=pytest.mark.gpu, id=f"{case}, cuda") for case in on_gpu]
    return pytest.mark.parametrize(("case", "device"), here + there, indirect=["device"])


def on_cpu(cases: list[tuple[Case, bool]]) -> Any:
    """Parametrized by `case` alone."""
    params = [pytest.param(case, marks=_marks(quick), id=str(case)) for case, quick in cases]
    return pytest.mark.parametrize("case", params)


def _marks(quick: bool) -> Any:
    return () if quick else pytest.mark.slow


EVERY_WAY = [case for case, _ in _cases((0,))]
every_way = on_cpu(_cases((0,)))
"""Each way on one backbone."""
every_case = on_cpu(_cases((0, 3, 6)))
"""Each way on three backbones."""
ways_everywhere = on_devices(_cases((0,)), EVERY_WAY)
blocks_everywhere = on_devices(_cases((0, 3, 6)), EVERY_WAY)
"""Each way on three backbones on a CPU, on one of them on a GPU."""
CASES = _cases((0, 3, 6)) + _cases((0, 3, 6), OF_MLPS)
everywhere = on_devices(CASES, [*EVERY_WAY, *(case for case, _ in _cases((0,), OF_MLPS))])
"""The same, and routed MLPs."""
every_family = pytest.mark.parametrize("family", BACKBONES)


class Batch(NamedTuple):
    """Rows alone, and together with padding on either side."""

    rows: list[Tensor]
    """Each [1, T]."""
    input_ids: Tensor
    mask: Tensor
    cuts: list[int]
    """Where chunks begin."""

    def real(self, row: int) -> Tensor:
        """Which of a padded row's tokens are no padding."""
        return self.mask[row].bool()


def together(rows: list[Tensor], left: list[int], cuts: list[int]) -> Batch:
    """Rows with so much padding on the left of each, and what is missing on the right."""
    width = max(row.shape[1] + before for row, before in zip(rows, left, strict=True))
    padded = [pad(row[0], before, width - before - row.shape[1]) for row, before in zip(rows, left, strict=True)]
    input_ids, mask = (torch.stack(parts) for parts in zip(*padded, strict=True))
    return Batch(rows, input_ids, mask, cuts)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Up to four rows of up to 24 tokens, padded on either side; cut anywhere, or token by token."""
    drawn = draw(
        st.lists(st.tuples(st.integers(1, 24), st.integers(0, 2**20), st.integers(0, 8)), min_size=1, max_size=4)
    )
    cuts = draw(st.one_of(st.just(list(range(40))), st.lists(st.integers(0, 40), max_size=6)))
    return together([tokens(1, length, seed) for length, seed, _ in drawn], [left for *_, left in drawn], cuts)


@torch.no_grad()
def in_chunks(
    model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int], length: int | None = None
) -> tuple[Tensor, Any]:
    """Logits [B, T, V] with a cache, chunk by chunk, and the cache; `length`: of a static one."""
    stock = isinstance(model, RoutedCausalLM)
    cache: Any = DynamicCache(config=model.config) if stock else RoutedCache(model.config, length)
    logits = []
    for start, end in pairwise(sorted({0, ids.shape[1], *(cut % ids.shape[1] for cut in cuts)})):
        seen = None if mask is None else mask[:, :end]
        # A graph's logits are overwritten by its next replay.
        logits.append(model(ids[:, start:end], attention_mask=seen, **{CACHE_NAME: cache}).logits.clone())
        assert cache.get_seq_length() == end
    return torch.cat(logits, dim=1), cache


def decode(
    model: Any, ids: Tensor, prompt: int, mask: Tensor | None = None, length: int | None = None
) -> tuple[Tensor, Any]:
    """Logits of the tokens after the prompt, one by one; and the cache, static if it has a length."""
    logits, cache = in_chunks(model, ids, mask, list(range(prompt, ids.shape[1])), length)
    return logits[:, prompt:], cache
