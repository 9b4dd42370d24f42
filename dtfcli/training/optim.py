"""Optimizer and learning-rate schedule: five groups of parameters, one factor per step.

Choices: a group is known by its parameters' names, so that a checkpoint needs no list of its own; only matrices are
decayed; the schedule is a pure function of the step, so that resuming needs no state.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

GROUPS = ("base", "prior", "forecast", "router", "predictor")


def group_of(parameter_name: str) -> str:
    """The learning-rate group of a parameter: what its name says, else base (the backbone)."""
    return next((group for group in ("predictor", "router", "forecast", "prior") if group in parameter_name), "base")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rates: dict[str, float],
    weight_decay: float,
    decay_router_scalars: bool = False,
) -> list[dict[str, Any]]:
    """Split trainable parameters by learning rate and by decay.

    Args:
        named_parameters: name → parameter; frozen ones are left out.
        learning_rates: peak rate of each of `GROUPS`.
        weight_decay: for matrices; norms, biases and scalars have none.
        decay_router_scalars: decay the router's scalars too, as the thesis did.

    Returns:
        Groups for an optimizer, with "name" (one of `GROUPS`) and "peak_lr" besides its own keys.
    """
    split: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        group = group_of(name)
        decayed = parameter.ndim >= 2 or (decay_router_scalars and group == "router")
        split.setdefault((group, decayed), []).append(parameter)
    return [
        {
            "params": split[group, decayed],
            "name": group,
            "lr": learning_rates[group],
            "peak_lr": learning_rates[group],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for group in GROUPS
        for decayed in (True, False)
        if (group, decayed) in split
    ]


def build_optimizer(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW, with the fused kernel where every parameter lies on a device that has one."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, betas=betas, fused=devices <= {"cpu", "cuda"})


def schedule_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the peak rate that step `step` (from 0) uses.

    Rises linearly over the warm-up, reaching 1 with its last step, then falls to 0 (which the step after the last
    would have) as a cosine or a line, or stays ("constant").
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


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that receive gradients."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
