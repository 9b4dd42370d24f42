"""Optimizer and learning-rate schedule: five groups of parameters, one factor per step.

Choices: a group is known by its parameters' names, so that a checkpoint needs no list of its own; only matrices are
decayed; the schedule is a pure function of the step, so that resuming needs no state.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dtfcli.settings.training import TrainingSettings

GROUPS = ("base", "prior", "forecast", "router", "predictor")


def group_of(parameter_name: str) -> str:
    """The learning-rate group that a parameter's name contains, else base (the backbone)."""
    return next((group for group in ("predictor", "router", "forecast", "prior") if group in parameter_name), "base")


def parameter_groups(model: nn.Module, training: TrainingSettings) -> list[dict[str, Any]]:
    """Split a model's trainable parameters by learning rate and by decay.

    Matrices are decayed; norms, biases and scalars are not, except the router's where the settings say so.

    Returns:
        Groups for an optimizer, with "name" (one of `GROUPS`) and "peak_lr" besides its own keys.
    """
    split: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name)
            decayed = parameter.ndim >= 2 or (training.decay_router_scalars and group == "router")
            split.setdefault((group, decayed), []).append(parameter)
    rates = training.learning_rates.model_dump()
    return [
        {
            "params": split[group, decayed],
            "name": group,
            "lr": rates[group],
            "peak_lr": rates[group],
            "weight_decay": training.weight_decay if decayed else 0.0,
        }
        for group in GROUPS
        for decayed in (True, False)
        if (group, decayed) in split
    ]


def build_optimizer(model: nn.Module, training: TrainingSettings) -> torch.optim.AdamW:
    """AdamW, with the fused kernel where every parameter lies on a device that has one."""
    groups = parameter_groups(model, training)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    betas = (training.betas[0], training.betas[1])
    return torch.optim.AdamW(groups, betas=betas, fused=devices <= {"cpu", "cuda"})


def schedule_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the peak rate at step `step` (from 0).

    It rises linearly to 1 at the last step of the warm-up, then falls to 0 at `total_steps` as a cosine or a line, or
    stays ("constant").
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1.0 - progress
    return 1.0


def set_learning_rates(param_groups: Iterable[dict[str, Any]], factor: float) -> dict[str, float]:
    """Apply a schedule factor to every group; returns group name → rate."""
    rates = {}
    for group in param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"]] = group["lr"]
    return rates
