"""Distillation: the chunked divergence against whole logits, whose tensors the parent has, what is minimized."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtfcli.experiment import train
from dtfcli.loading.adapters import adapt
from dtfcli.models.conversion import convert
from dtfcli.runs.files import read_metrics
from dtfcli.settings.training import DistillSettings
from dtfcli.training import distillation
from dtfcli.training.distillation import Distillation, dense_parent
from dtfcli.training.objectives import Objective
from tests.conftest import Outcome
from tests.tiny import dense_model, routed_model, tokens
from tests.training.small_runs import small_settings


def whole(hidden: Tensor, head: Tensor, parents: Tensor, parents_head: Tensor, labels: Tensor, t: float) -> Tensor:
    """The divergence as it is written down, with whole logits; mean over the targets."""
    ours = F.log_softmax(F.linear(hidden[:, :-1], head).float() / t, dim=-1)
    theirs = F.log_softmax(F.linear(parents[:, :-1], parents_head).float() / t, dim=-1)
    each = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    counted = labels[:, 1:] != -100
    return t**2 * each[counted].sum() / counted.sum()


@pytest.mark.parametrize(("temperature", "elements"), [(0.5, 1), (1.0, 300), (3.0, 2**24)])
def test_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch, temperature: float, elements: int) -> None:
    """Values and gradients, however the rows are cut, with targets left out."""
    monkeypatch.setattr(distillation, "_CHUNK_ELEMENTS", elements)
    parent: Any = dense_model(seed=3)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 32, generator=generator, requires_grad=True)
    head = torch.randn(97, 32, generator=generator, requires_grad=True)
    input_ids = tokens(3, 11)
    labels = input_ids.clone()
    labels[0, 4:7] = -100
    targets = int((labels[:, 1:] != -100).sum())
    settings = DistillSettings(weight=0.3, lm_weight=0.4, temperature=temperature)
    learned = Distillation(parent, settings)(hidden, head, input_ids, labels, targets)

    with torch.no_grad():
        parents = parent.model(input_ids=input_ids).last_hidden_state
    divergence = whole(hidden, head, parents, parent.lm_head.weight, labels, temperature)
    lm_loss = F.cross_entropy((hidden @ head.t())[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    total = 0.4 * lm_loss + 0.3 * divergence
    for ours, theirs in zip(learned, (total, lm_loss, divergence), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(total, (hidden, head))
    gradients = torch.autograd.grad(learned.loss, (hidden, head))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lm_weight", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("architecture", ["dtf", "mod", "dense"])
def test_the_loss_is_the_models_own_and_what_is_learnt(architecture: str, lm_weight: float) -> None:
    model = dense_model() if architecture == "dense" else routed_model(architecture=architecture)
    settings = DistillSettings(enabled=True, weight=2.0, lm_weight=lm_weight)
    alone, taught = Objective(model), Objective(model, Distillation(dense_model(seed=3), settings))
    batch = tokens(2, 20)
    one, other = alone.train()(batch, 38), taught.train()(batch, 38)
    assert torch.allclose(one.lm_loss, other.lm_loss)
    assert torch.allclose(other.loss, one.loss + (lm_weight - 1) * one.lm_loss + 2.0 * other.distill_loss)
    assert other.distill_loss.item() > 0
    evaluated = taught.eval()(batch, 38)
    assert torch.equal(evaluated.loss, evaluated.lm_loss)
    assert evaluated.distill_loss is None


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_whole_logits_say_the_same(kind: str) -> None:
    """What serves any decoder gives the losses and gradients of what serves the backbones that we know."""
    model, parent = (dense_model(kind, seed=seed) for seed in (0, 3))
    input_ids = tokens(2, 20)
    labels = input_ids.clone()
    labels[1, 5:9] = -100
    learn = Distillation(parent, DistillSettings(weight=0.3, lm_weight=0.4, temperature=2.0))
    known = Objective(model, learn).train()._stock_losses(input_ids, labels, 35, learn)
    gradients = torch.autograd.grad(known.loss, list(model.parameters()))
    learned = learn.of_logits(model, input_ids, labels, 35)
    for ours, theirs in zip((known.loss, known.lm_loss, known.distill_loss), learned, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(learned.loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["dtf", "dense"])
def test_with_lora_the_parent_has_the_models_tensors(tmp_path: Path, architecture: str) -> None:
    model: Any = dense_model() if architecture == "dense" else convert(dense_model(), architecture, 0.5)
    before = dense_model()(tokens(2, 12)).logits
    parent = dense_parent(model, share=True, dtype=torch.float32)
    settings = small_settings(tmp_path, architecture, model={"base": str(tmp_path)})
    settings = settings.model_copy(update={"lora": settings.lora.model_copy(update={"enabled": True})})
    dense_model().save_pretrained(tmp_path)
    adapt(model, settings)
    ours = {name.replace(".base_layer", ""): parameter.data_ptr() for name, parameter in model.named_parameters()}
    for name, parameter in parent.named_parameters():
        assert parameter.data_ptr() == ours[name], name
        assert not parameter.requires_grad
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(parent(tokens(2, 12)).logits, before)
    assert not parent.training


@pytest.mark.parametrize("architecture", ["mod", "dense"])
def test_without_lora_the_parent_is_a_copy(architecture: str) -> None:
    model: Any = dense_model() if architecture == "dense" else convert(dense_model(), architecture, 0.5)
    parent = dense_parent(model, share=False, dtype=torch.bfloat16)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    for parameter in parent.parameters():
        assert parameter.data_ptr() not in pointers
        assert parameter.dtype == torch.bfloat16
    assert model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    if architecture == "dense":  # which starts at its parent
        parent = dense_parent(model, share=False, dtype=torch.float32)
        losses = Objective(model, Distillation(parent, DistillSettings())).train()(tokens(2, 16), 30)
        assert losses.distill_loss.item() == pytest.approx(0.0, abs=1e-6)


def test_a_run_with_distillation(tmp_path: Path) -> None:
    """The metric is there, the language-model loss stays apart, and no checkpoint holds the parent."""
    base = train(small_settings(tmp_path / "base", "dense", training={"max_steps": 1})).final_model_path
    losses, sizes = {}, {}
    for name, extra in (("plain", {}), ("taught", {"distill": {"enabled": True}})):
        training = {"max_steps": 2}
        result = train(small_settings(tmp_path / name, model={"base": str(base)}, training=training, **extra))
        losses[name] = [line for line in read_metrics(result.run_dir / "metrics.jsonl") if "train/loss" in line]
        checkpoint = next((result.run_dir / "checkpoints").glob("step-*"))
        sizes[name] = (checkpoint / "model.safetensors").stat().st_size
    assert sizes["plain"] == sizes["taught"]
    assert "train/distill_loss" not in losses["plain"][0]
    assert all(line["train/distill_loss"] >= 0 for line in losses["taught"])
    first, taught = losses["plain"][0], losses["taught"][0]
    assert first["train/loss"] == pytest.approx(taught["train/loss"], abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_the_dry_run_counts_the_copy(dtf: Callable[..., Outcome], lora: bool) -> None:
    """Of the backbone alone, in the precision of the computation; none with LoRA, which shares it."""
    command = ["train", "dtf-smollm2-135m", "run.dtype=bfloat16", f"lora.enabled={str(lora).lower()}", "--dry-run"]
    plain, taught = (
        json.loads(dtf(*command, f"distill.enabled={switch}", "--json").stdout)["account"]
        for switch in ("false", "true")
    )
    backbone = 134_515_008  # SmolLM2-135M
    assert taught["training_bytes"] - plain["training_bytes"] == (0 if lora else 2 * backbone)
