"""The same as `routing`, as loops over rows and tokens: the specification that the tests compare with.

Slow on purpose, differentiable, and written to read like the equations. Not uploaded with a model.
Each function treats one row, given as a list of its real tokens in order: padding is somebody else's business.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def surprise(original: Tensor, posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """D_st (3.6) and D_ch (3.7) of one token; [D] each → two 0-d tensors."""
    size = original.shape[0]
    static = change = torch.zeros(())
    for i in range(size):
        static = static + (posterior[i].float() - original[i].float()) ** 2 / size
        change = change + (posterior[i].float() - prior[i].float()) ** 2 / size
    return static, change


def moving_average(values: list[Tensor], window: int, skip: int = 0) -> list[Tensor]:
    """MA in (3.9): mean of the last `window` values up to each token, the first `skip` tokens left out."""
    averages = []
    for t in range(len(values)):
        recent = [values[s].detach() for s in range(skip, t + 1)][-window:]
        averages.append(torch.stack(recent).mean() if recent else torch.zeros(()))
    return averages


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def dtf_gate(
    static: Tensor, change: Tensor, average: Tensor, o_ce: Tensor, m_cu: Tensor, beta_ce: Tensor, beta_cu: Tensor
) -> tuple[Tensor, Tensor]:
    """G (3.12) of one token and the score that orders tokens like it, −ln(1 − G)."""
    expected = static - (change - torch.log(o_ce + 1e-10))
    unexpected = static - m_cu * average
    s_ce = sigmoid(torch.log1p(torch.exp(beta_ce)) * expected)
    s_cu = sigmoid(torch.log1p(torch.exp(beta_cu)) * unexpected)
    gate = s_ce + s_cu - s_ce * s_cu
    return gate, -torch.log(1 - gate.double())


def mean_square(x: Tensor) -> Tensor:
    """‖x‖² / D of one token, [D] → 0-d."""
    total = torch.zeros(())
    for value in x.float():
        total = total + value**2 / x.shape[0]
    return total


def cost_score(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """ŝ = w · n, n = x / RMS(x), of one token; 0-d."""
    n = x.detach().float() / torch.sqrt(mean_square(x.detach()) + eps)
    score = torch.zeros(())
    for value, w in zip(n, weight, strict=True):
        score = score + w * value
    return score


def cost_loss(scores: list[Tensor], costs: list[Tensor], weights: list[float]) -> Tensor:
    """Σ w (ŝ − c − mean)² / Σ w over the tokens whose cost is known; the mean is weighted alike."""
    errors = [score - cost for score, cost in zip(scores, costs, strict=True)]
    mean = sum(w * e.detach() for w, e in zip(weights, errors, strict=True)) / sum(weights)
    squares = [w * (e - mean) ** 2 for w, e in zip(weights, errors, strict=True)]
    return torch.stack(squares).sum() / sum(weights)


def cost(update: Tensor, forecast: Tensor | None = None) -> Tensor:
    """What a token loses by skipping: ln(‖Δ‖² / D), or with a forecast ln(‖Δ − f‖² / D); [D] each → 0-d."""
    lost = update if forecast is None else update - forecast
    return torch.log(mean_square(lost) + 1e-9)


def forecast_miss(update: Tensor, forecast: Tensor) -> Tensor:
    """‖Δ − f‖² / ‖Δ‖² of one token; 0-d."""
    return mean_square(update.detach() - forecast) / (mean_square(update.detach()) + 1e-9)


def capacity(share: float, length: int) -> int:
    """K of a row of `length` real tokens."""
    if length == 0:
        return 0
    return max(1, math.floor(share * length))


def select_topk(scores: list[float], share: float, sinks: int = 0) -> list[int]:
    """Positions of the K tokens: the sinks first, then the best scores; in position order."""
    count = capacity(share, len(scores))
    forced = list(range(min(sinks, count)))
    others = sorted(range(len(forced), len(scores)), key=lambda t: scores[t], reverse=True)
    return sorted(forced + others[: count - len(forced)])


def select_threshold(scores: list[float], threshold: float, sinks: int = 0) -> list[int]:
    """Positions of the tokens that are sinks or score above the threshold."""
    return [t for t in range(len(scores)) if t < sinks or scores[t] > threshold]


def routed_layer(
    row: Tensor,
    chosen: list[int],
    gates: list[Tensor],
    block: Callable[[Tensor, list[int]], Tensor],
    kind: str,
    skip: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """One row through a routed layer: s + gate · (block(x) − s) at the chosen places, s at the others.

    Args:
        row: [T, D], the row's real tokens.
        chosen: positions in order.
        gates: soft gate of every token.
        block: the backbone's block on [K, D] tokens at given positions, causal among themselves.
        kind: "soft" or "straight_through".
        skip: s(x), what a token [D] is that does not enter: itself, or with a forecast x + f(x).

    Returns:
        [T, D].
    """
    result = [skip(row[t]) for t in range(row.shape[0])]
    if not chosen:
        return torch.stack(result)
    processed = block(torch.stack([row[t] for t in chosen]), chosen)
    for slot, t in enumerate(chosen):
        if kind == "straight_through":
            update = (processed[slot] - result[t]).detach()
            result[t] = processed[slot] + (gates[t] - gates[t].detach()) * update
        else:
            result[t] = result[t] + gates[t] * (processed[slot] - result[t])
    return torch.stack(result)


def share_threshold(scores: list[float], share: float, sinks: int = 0) -> float:
    """Midway between the last score that is routed and the first that is not, at the share γ of all tokens."""
    free = sorted(scores[sinks:], reverse=True)
    count = round(share * len(scores) - sinks)
    last, first = max(count - 1, 0), min(max(count, 0), len(free) - 1)
    return (free[min(last, len(free) - 1)] + free[first]) / 2
