"""How often the host waits for the device; on a GPU each wait leaves it idle.

Training never does between the first layer and the loss. A causal pass does once, at its end, and decoding a token not
at all; on a CPU, where looking is free, every routed layer may look (`looks`).
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtfcli.models import entrance
from dtfcli.models.cache import CACHE_NAME, RoutedCache
from tests.budget import examples
from tests.tiny import OPTIONS, routed_model, shared_routed_model, tokens

WAITS = {
    "aten::_local_scalar_dense",  # .item(), bool(), int()
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
}
CASES: dict[str, dict[str, Any]] = {
    "dtf": {},
    "mod": {"architecture": "mod"},
    "predictor": {"predictor_loss_weight": 0.1},
    "layerdrop": {"architecture": "layerdrop"},
    "random": {"architecture": "random"},
}
CASES |= {name: fields for name, fields in OPTIONS.items() if fields.get("budget") != "model"}
"""One budget for the model trains by threshold, where the number of slots depends on the scores."""


class Watched(TorchDispatchMode):
    """Notes operations whose result the host has to see."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in WAITS or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Tensors that travel to the host without an operation count, too."""
    mode = Watched()
    for name in ("tolist", "cpu", "numpy"):
        plain = getattr(Tensor, name)

        def noted(self: Tensor, *args: Any, plain: Any = plain, name: str = name) -> Any:
            mode.waits.append(name)
            return plain(self, *args)

        monkeypatch.setattr(Tensor, name, noted)
    return mode


def test_the_watch_sees_what_it_should(watched: Watched) -> None:
    x = torch.arange(3.0)
    seen = [lambda: x.sum().item(), lambda: bool(x.any()), x.tolist, lambda: x[x > 1], x.nonzero, x.cpu]
    for number, look in enumerate(seen, 1):
        with watched:
            look()
        assert len(watched.waits) >= number
        watched.waits = ["seen"] * number
    with watched:
        torch.where(x > 1, x, 0.0).topk(2).indices.sum()
    assert len(watched.waits) == len(seen)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_training_does_not_wait(name: str, checkpointing: bool, watched: Watched) -> None:
    fields = dict(CASES[name])
    explores = fields.get("bypass") == "forecast" or fields.get("score", "surprise") != "surprise"
    architecture = fields.pop("architecture", "dtf")
    model: Any = routed_model("llama", architecture, 0.5, **fields, **({"explore": 0.25} if explores else {}))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tokens(4, 32)
    watched.waits.clear()
    with watched:
        for rows in ids.split(2):  # accumulated
            model(input_ids=rows, labels=rows, use_cache=False, num_items_in_batch=124.0).loss.backward()
    assert watched.waits == []
    assert all(p.grad is not None for p in model.model.layers[1].parameters() if p.requires_grad) or name == "layerdrop"


EVERY_CASE = CASES | {name: fields for name, fields in OPTIONS.items() if fields.get("budget") == "model"}


@pytest.fixture
def blind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of a case whose layers do not look."""
    fields = dict(EVERY_CASE[request.param])
    model: Any = shared_routed_model("llama", fields.pop("architecture", "dtf"), **fields)
    monkeypatch.setattr(model.model, "looks", False)
    return model


QUICK = ("dtf", "mod", "layerdrop", "forecast error", "forecast error, one budget", "random, attention")
every_case = pytest.mark.parametrize(
    "blind", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EVERY_CASE], indirect=True
)
"""`make test` tries some of them."""


@every_case
@torch.no_grad()
def test_a_prompt_waits_once(blind: Any, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the slots are enough; else layers look."""
    monkeypatch.setattr(entrance, "slots_per_row", lambda capacity, length, sinks: length)
    for mask, waits in ((None, 1), (torch.ones(2, 40).long(), 2)):  # a mask of several rows is looked at before
        ids = tokens(2, 40)
        blind(ids, use_cache=True)
        watched.waits.clear()
        with watched:
            blind(ids, attention_mask=mask, use_cache=True)
        assert len(watched.waits) <= waits
    with watched:
        watched.waits.clear()
        blind(tokens(1, 40), attention_mask=torch.ones(1, 40).long(), use_cache=True)
    assert len(watched.waits) <= 1


@every_case
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_decoding_does_not_wait(blind: Any, rows: int, watched: Watched) -> None:
    ids = tokens(rows, 60)
    cache = blind(ids[:, :20], use_cache=True)[CACHE_NAME]
    blind(ids[:, 20:21], **{CACHE_NAME: cache})  # the first token after a prompt makes room for the next 31
    watched.waits.clear()
    with watched:
        for n in range(21, 25):
            blind(ids[:, n : n + 1], **{CACHE_NAME: cache})
        for n in range(25, 29):
            mask = torch.ones(rows, n + 1).long()
            blind(ids[:, n : n + 1], attention_mask=mask, **{CACHE_NAME: cache})
    assert watched.waits == []


@torch.no_grad()
def _in_chunks(model: Any, ids: Tensor, mask: Tensor | None, sizes: list[int]) -> tuple[Tensor, RoutedCache]:
    cache, logits, start = RoutedCache(model.config), [], 0
    for size in sizes:
        end = start + size
        seen = None if mask is None else mask[:, :end]
        logits.append(model(ids[:, start:end], attention_mask=seen, **{CACHE_NAME: cache}).logits)
        start = end
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EVERY_CASE]
)
@pytest.mark.parametrize("enough", [True, pytest.param(False, marks=pytest.mark.slow)])
@settings(max_examples=examples(4), deadline=None)
@given(data=st.data())
def test_looking_changes_nothing(name: str, enough: bool, data: st.DataObject) -> None:
    """Rows, chunks, padding on either side, too few slots: the same logits, the same cache."""
    fields = dict(EVERY_CASE[name])
    model: Any = shared_routed_model("llama", fields.pop("architecture", "dtf"), **fields)
    rows = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.sampled_from([1, 1, 2, 7, 16]), min_size=1, max_size=6))
    length = sum(sizes)
    left = data.draw(st.lists(st.integers(0, sizes[0]), min_size=rows, max_size=rows))
    masked = data.draw(st.booleans())
    mask = (torch.arange(length) >= torch.tensor(left).unsqueeze(1)).long() if masked else None
    ids = tokens(rows, length, seed=data.draw(st.integers(0, 5)))
    with pytest.MonkeyPatch.context() as patch:
        if not enough:
            patch.setattr(entrance, "slots_per_row", lambda capacity, length, sinks: 1)
        patch.setattr(model.model, "looks", True)
        expected, its = _in_chunks(model, ids, mask, sizes)
        patch.setattr(model.model, "looks", False)
        logits, cache = _in_chunks(model, ids, mask, sizes)
    real = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask.bool()
    assert torch.allclose(logits[real], expected[real], rtol=1e-5, atol=1e-5)
    assert cache.routed_shares == its.routed_shares
    assert cache.nbytes == its.nbytes


@pytest.mark.parametrize("name", ["dtf", "mod", "forecast error", "update size"])
@torch.no_grad()
def test_changing_a_cache_that_nobody_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams, cropped tokens and more of them: what only the device knows follows."""
    fields = dict(EVERY_CASE[name])
    model: Any = shared_routed_model("llama", fields.pop("architecture", "dtf"), **fields)
    ids = tokens(2, 90)
    found = []
    for looks in (True, False):
        monkeypatch.setattr(model.model, "looks", looks)
        logits, cache = _in_chunks(model, ids[:, :45], None, [40, 1, 1, 1, 1, 1])
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0]))
        ids_now = ids.flip(0)
        for n in range(42, 88):
            logits = model(ids_now[:, n : n + 1], **{CACHE_NAME: cache}).logits
        found.append((logits, cache.routed_shares))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("asked", ["argument", "config"])
@torch.no_grad()
def test_hidden_states_are_those_of_one_run(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = routed_model("llama", "mod", 0.5)
    monkeypatch.setattr(entrance, "slots_per_row", lambda capacity, length, sinks: 1)
    model.model.looks = False
    if asked == "config":
        model.config.output_hidden_states = True
    out = model(tokens(1, 12), **({"output_hidden_states": True} if asked == "argument" else {}))
    assert len(out.hidden_states) == 1 + model.config.num_hidden_layers
