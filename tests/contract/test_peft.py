"""Routed models under peft, used directly as any Transformers model is."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.cases import Case, every_way
from tests.tiny import EVERY_ARCHITECTURE, routed_model, tokens

ADDED = ("router", "prior", "forecast", "predictor")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def wrap(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, **options))


def train_steps(model: Any, steps: int = 3) -> list[float]:
    """Losses of some steps on the same text."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = tokens(2, 24), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).lm_loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    model.eval()
    return losses


def logits(model: Any, mode: str = "topk") -> Tensor:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad(), inner.routing_mode(mode):
        return model(input_ids=tokens(3, 40, seed=9)).logits


@every_way
@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "routing in full"])
def test_train_and_merge(case: Case, whole: bool) -> None:
    """The base does not move; training lowers the loss; what is merged says what the adapted model said."""
    model = case.fresh()
    parts = [part for part in ADDED if any(f".{part}." in name for name, _ in model.named_parameters())]
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    wrapped = wrap(model, modules_to_save=parts if whole else None)
    assert torch.equal(logits(wrapped), before)
    losses = train_steps(wrapped, 6)
    assert losses[-1] < losses[0]
    for name, parameter in wrapped.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        if plain in base:
            assert torch.equal(parameter, base[plain]), name
    wrapped.double()  # merging rounds the weights anew: up to 2e-5 on these logits in float32
    trained = {mode: logits(wrapped, mode) for mode in (case.mode, "topk")}
    assert (trained["topk"] - before).abs().max() > 1e-3
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(case.on())
    assert set(merged.state_dict()) == set(base)
    for mode, expected in trained.items():
        assert (logits(merged, mode) - expected).abs().max() <= 1e-5, mode


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_saved_and_loaded_by_peft(architecture: str, tmp_path: Path) -> None:
    saved = ["router", "prior"] if architecture == "dtf" else ["router"]
    model = routed_model(architecture=architecture)
    wrapped = wrap(copy.deepcopy(model), modules_to_save=saved)
    train_steps(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    for mode in ("topk", "threshold"):
        assert torch.equal(logits(again, mode), logits(wrapped, mode))


def test_generation_with_the_cache() -> None:
    wrapped = wrap(routed_model())
    train_steps(wrapped)
    prompt = tokens(2, 12)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = wrapped.generate(input_ids=prompt, **options)
        assert torch.equal(cached, wrapped.generate(input_ids=prompt, use_cache=False, **options))


def test_targets_do_not_reach_what_routing_adds() -> None:
    wrapped = wrap(routed_model())
    adapted = [name for name, _ in wrapped.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 6 * len(TARGETS)
    assert not [name for name in adapted if "prior" in name or "router" in name]
