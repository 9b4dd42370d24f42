"""The host does not wait for the GPU while it trains or decodes, and once for a prompt; told by torch itself.

`tests.contract.test_no_waiting` counts operations on the CPU; copies from and to the device show here alone.
"""

from typing import Any

import pytest
import torch

from dtfcli.models import entrance
from dtfcli.models.cache import CACHE_NAME
from dtfcli.training.objectives import Objective
from tests.gpu.cases import CASES, build, every_case, noting_waits, on_device
from tests.tiny import tokens

pytestmark = pytest.mark.gpu

BY_TOPK = [name for name, fields in CASES.items() if fields.get("budget") != "model"]
"""One budget for the model trains by threshold, where the number of slots depends on the scores."""


def explores(case: str) -> bool:
    fields = CASES[case]
    return fields.get("bypass") == "forecast" or fields.get("score", "surprise") != "surprise"


def test_the_watch_sees_a_wait(on_gpu: None, device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with noting_waits(device) as places:
        x.sum().item()
        bool(x.any())
        torch.ones(3).to(device)
        torch.where(x > 1, x, 0.0).topk(2).indices.sum()
    assert len(places) == 3


@pytest.mark.parametrize(
    ("case", "checkpointing"),
    [*((case, False) for case in BY_TOPK), *((case, True) for case in ("dtf", "mod", "forecast error"))],
)
def test_training_steps(case: str, checkpointing: bool, device: torch.device) -> None:
    """Forward, loss and backward, in micro-batches, with what is logged."""
    model = build(case, **({"explore": 0.25} if explores(case) else {})).to(device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective, ids = Objective(model).train(), tokens(4, 32).to(device)

    def step(rows: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = objective(rows, 4 * 31, output_routing=True)
        losses.loss.backward()

    step(ids[:2])
    with noting_waits(device) as places:
        for rows in ids.split(2):
            step(rows)
    assert places == []


@every_case
@torch.no_grad()
def test_decoded_tokens(case: str, device: torch.device) -> None:
    """Layers do not look at how many tokens enter; the first token after a prompt makes room for 31."""
    model = on_device(case, device)
    for rows, masked in ((1, False), (1, True), (3, False), (3, True)):
        ids = tokens(rows, 60).to(device)
        mask = torch.ones_like(ids)

        def asked(end: int, masked: bool = masked, mask: torch.Tensor = mask) -> Any:
            return {"attention_mask": mask[:, :end] if masked else None}

        cache = model(ids[:, :20], use_cache=True, **asked(20))[CACHE_NAME]
        model(ids[:, 20:21], **asked(21), **{CACHE_NAME: cache})
        with noting_waits(device) as places:
            for n in range(21, 27):
                model(ids[:, n : n + 1], **asked(n + 1), **{CACHE_NAME: cache})
        assert places == [], (rows, masked)


@every_case
@torch.no_grad()
def test_prompts(case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, at its end, if the slots are enough; a mask of several rows is looked at before, too."""
    model = on_device(case, device)
    monkeypatch.setattr(entrance, "slots_per_row", lambda capacity, length, sinks: length)
    for rows, masked, most in ((2, False, 1), (1, True, 1), (2, True, 2)):
        ids = tokens(rows, 40).to(device)
        how: dict[str, Any] = {"use_cache": True, "attention_mask": torch.ones_like(ids) if masked else None}
        model(ids, **how)
        with noting_waits(device) as places:
            model(ids, **how)
        assert len(places) <= most, places
