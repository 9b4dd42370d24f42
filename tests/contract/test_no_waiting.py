"""Training never waits for the device between the first layer and the loss: on a GPU each wait leaves it idle."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import OPTIONS, routed_model, tokens

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
