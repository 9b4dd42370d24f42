"""Losses of routed and dense models through one interface."""

import pytest
import torch

from dtfcli.settings.training import DistillSettings
from dtfcli.training.distillation import Distillation
from dtfcli.training.objectives import Objective
from tests.tiny import VOCABULARY, dense_model, routed_model, tokens


def build(architecture: str, **fields: float) -> Objective:
    return Objective(dense_model() if architecture == "dense" else routed_model(architecture=architecture, **fields))


@pytest.mark.parametrize("architecture", ["dense", "dtf", "mod"])
def test_micro_batches_add_up_to_one_large_batch(architecture: str) -> None:
    """1 × 4 rows and 4 × 1 rows: the same losses and gradients to 1e-6, auxiliary and distilled terms included."""
    weights = {"router_aux_loss_weight": 0.3, "router_z_loss_weight": 0.1} if architecture == "mod" else {}
    distillation = Distillation(dense_model(seed=3), DistillSettings(enabled=True))
    batch = tokens(4, 24)

    def run(parts: list[torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        objective = Objective(build(architecture, **weights).model, distillation).train()
        total = 0.0
        for part in parts:
            losses = objective(part, 4 * 23)
            losses.loss.backward()
            total += losses.loss.item()
        return total, {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}

    whole, gradients = run([batch])
    summed, accumulated = run(list(batch.split(1)))
    assert summed == pytest.approx(whole, abs=1e-6 * max(1.0, abs(whole)))
    assert gradients.keys() == accumulated.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert torch.allclose(gradient, accumulated[name], atol=2e-6 * scale), name


def test_training_loss_adds_the_weighted_auxiliary_losses() -> None:
    dtf = build("dtf").train()
    losses = dtf(tokens(2, 16), 2 * 15)
    expected = losses.lm_loss + dtf.model.config.prior_loss_weight * losses.prior_loss
    assert torch.allclose(losses.loss, expected)
    mod = build("mod", router_aux_loss_weight=0.5).train()
    losses = mod(tokens(2, 16), 2 * 15)
    assert losses.router_loss.item() > 0
    assert torch.allclose(losses.loss, losses.lm_loss + losses.router_loss)


def test_vocabulary_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture in ("dense", "dtf"):
        objective = build(architecture)
        monkeypatch.setattr(objective.model.lm_head, "forward", lambda _: pytest.fail("logits were computed"))
        for mode in (True, False):
            objective.train(mode)(tokens(2, 16), 2 * 15)
        assert objective.model.lm_head.weight.shape[0] == VOCABULARY


@pytest.mark.parametrize("architecture", ["dtf", "mod"])
def test_routing_statistics(architecture: str) -> None:
    objective = build(architecture).train()
    statistics = objective(tokens(4, 20), 4 * 19, output_routing=True).routing
    names = {"score_mean", "score_std", "routed_share", "gate"}
    if architecture == "dtf":
        names |= {"s_ce", "s_cu", "d_st", "d_ch"}
    assert set(statistics) == {f"router/{layer}/{name}" for layer in (1, 3, 5) for name in names}
    assert statistics["router/3/routed_share"].item() == pytest.approx(0.5)
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("architecture", ["dense", "dtf", "mod"])
def test_only_labels_are_targets(architecture: str) -> None:
    """The loss over a third of the tokens is theirs alone, and micro-batches with few and many add up."""
    objective = build(architecture).eval()
    batch = tokens(4, 24)
    labels = batch.masked_fill(torch.rand(4, 24, generator=torch.Generator().manual_seed(1)) > 0.3, -100)
    targets = int((labels[:, 1:] != -100).sum())
    logits = objective.model(input_ids=batch).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    losses = objective(batch, targets, labels=labels)
    assert torch.allclose(losses.lm_loss, expected, atol=1e-5)
    assert torch.equal(losses.loss, losses.lm_loss)  # in eval mode nothing is added
    assert torch.allclose(objective(batch, 4 * 23).lm_loss, objective.model(batch, labels=batch).loss, atol=1e-5)
    parts = [objective(batch[rows], targets, labels=labels[rows]).lm_loss for rows in (slice(0, 1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx(expected.item(), abs=1e-5)
