"""A new score is one file, one row and one twin: a toy score from outside the package keeps the contract."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtfcli.models import configuration_fields, routers
from dtfcli.models.configuration_fields import Way
from dtfcli.models.router import Router
from dtfcli.models.routers import register_way
from dtfcli.models.routing import Scores
from tests import cases
from tests.cases import CPU, Case
from tests.contract import naive_model, test_contract

TOY = Case("norm", "olmo2")


class NormRouter(Router):
    """Tokens with large hidden states enter, in units that the router learns."""

    scale: torch.nn.Parameter

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scale = torch.nn.Parameter(torch.empty(1, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.scale.fill_(0.1)

    def forward(self, hidden_states: Tensor, below: tuple[Tensor, ...], context: Any, store: Any) -> Scores:
        score = hidden_states.float().norm(dim=-1) * self.scale
        return Scores(score, torch.sigmoid(score))


def norm(x: Tensor, router: Any, whole: Any) -> naive_model.Scored:
    """The toy's twin."""
    scores = [sum(value**2 for value in token).sqrt() * router.scale[0] for token in x]
    return scores, [1 / (1 + torch.exp(-score)) for score in scores]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registered for the length of a test."""
    monkeypatch.setitem(naive_model.TWINS, "norm", norm)
    monkeypatch.setitem(cases.WAYS, "norm", {"score": "norm"})
    register_way("norm", Way(("score", "sink_tokens", "kv_tokens", "gate")), NormRouter)
    yield
    del configuration_fields.WAYS["norm"]
    del routers.ROUTERS["norm"]


PROMISES = {name: test for name, test in vars(test_contract).items() if "case" in getattr(test, "__annotations__", ())}


@pytest.mark.parametrize("promise", PROMISES)
def test_the_toy_keeps_the_contract(promise: str, tmp_path: Path) -> None:
    test: Any = PROMISES[promise]
    given: dict[str, Any] = {"case": TOY, "device": CPU, "tmp_path": tmp_path, "explore": 0.0}
    test(**{name: value for name, value in given.items() if name in test.__annotations__})
