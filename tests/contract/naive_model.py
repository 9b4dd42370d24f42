"""A routed model as it is meant: the stock model, whose routed layers are the stock layer over all tokens with a mask.

A row at a time, scores by loops over tokens, no slots, no cache. The mask says which keys a token sees: its own and
those that the routed layer keeps, of earlier tokens, as far back as the layer's window reaches. A half of a layer is
the stock layer with the other half silenced. Parameters are those of the routed model, so gradients can be compared.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from dtfcli.models import routing_naive as naive
from dtfcli.models.conversion import to_dense

Scored = tuple[list[Tensor], list[Tensor]]
"""Score and gate of each token."""


def surprise(x: Tensor, router: Any, whole: "NaiveModel") -> Scored:
    """Of tokens [T, D], by what the layer below observed."""
    scalars = (router.log_o_ce.exp(), router.log_m_cu.exp(), router.beta_ce, router.beta_cu)
    averages = naive.moving_average(whole.surprise[0], whole.config.ma_window, whole.config.sink_tokens)
    both = [naive.dtf_gate(*each, *scalars) for each in zip(*whole.surprise, averages, strict=True)]
    return [score.squeeze().float() for _, score in both], [gate.squeeze() for gate, _ in both]


def linear(x: Tensor, router: Any, whole: "NaiveModel") -> Scored:
    scores = [token @ router.weight for token in x]
    return scores, [naive.sigmoid(score) for score in scores]


def cost(x: Tensor, router: Any, whole: "NaiveModel") -> Scored:
    scores = [naive.cost_score(token, router.weight, eps=whole.config.norm_eps) for token in x]
    return scores, [torch.ones(())] * len(x)


def nothing(x: Tensor, router: Any, whole: "NaiveModel") -> Scored:
    return [torch.ones(())] * len(x), [torch.ones(())] * len(x)


TWINS: dict[str, Callable[[Tensor, Any, "NaiveModel"], Scored]] = {
    "surprise": surprise,
    "update_size": cost,
    "forecast_error": cost,
    "mod": linear,
    "random": linear,
    "layerdrop": nothing,
}
"""The naive score of each way of choosing."""


class NaiveModel:
    """The naive twin of a routed model.

    Attributes:
        mode: "topk", or "threshold" at `capacity`.
    """

    def __init__(self, model: Any, mode: str, capacity: float | None = None) -> None:
        self.config, self.mode = model.config, mode
        self.capacities = model.config.layer_capacities(capacity)
        self.stock: Any = to_dense(model)
        self.learnt: dict[str, dict[int, list[Any]]] = {}
        self.surprise: tuple[list[Tensor], list[Tensor]] = [], []
        _share_parameters(model, self.stock)
        for index in model.model.routed:
            self.stock.model.layers[index] = _Routed(self, self.stock.model.layers[index], model.model.layers[index])
            if hasattr(model.model.layers[index - 1], "prior"):
                below = self.stock.model.layers[index - 1]
                self.stock.model.layers[index - 1] = _Decision(self, below, model.model.layers[index - 1])

    def logits(self, row: Tensor) -> Tensor:
        """[1, T] → [T, V]; what layers learn from is noted."""
        return self.stock(row, use_cache=False).logits[0]

    def note(self, name: str, layer: int, values: list[Any]) -> None:
        """Numbers of the tokens of a row."""
        self.learnt.setdefault(name, {}).setdefault(layer, []).extend(values)

    def loss(self, rows: list[Tensor]) -> Tensor:
        """What training minimizes on some rows: the language model's loss, and what routing learns from."""
        self.learnt.clear()
        logits = [self.logits(row)[:-1] for row in rows]
        total = cross_entropy(torch.cat(logits), torch.cat([row[0, 1:] for row in rows]))
        of, config = self.learnt, self.config
        if errors := of.get("prior error"):
            total = total + config.prior_loss_weight * torch.stack([_mean(e) for e in errors.values()]).mean()
        router = [naive.cost_loss(*map(list, zip(*each, strict=True))) for each in of.get("cost", {}).values()]
        router += [
            config.predictor_loss_weight
            * _mean([binary_cross_entropy_with_logits(p, torch.tensor(float(chosen))) for p, chosen in each])
            for each in of.get("predictor", {}).values()
        ]
        if router:
            total = total + torch.stack(router).sum() / len(self.capacities)
        if misses := of.get("miss"):
            total = total + config.forecast_loss_weight * torch.stack([_mean(m) for m in misses.values()]).mean()
        return total


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _share_parameters(model: Any, stock: Any) -> None:
    """Give the stock model the routed one's parameters themselves."""
    ours = dict(model.named_parameters(remove_duplicate=False))
    for path, module in stock.named_modules():
        for name in [name for name, parameter in module._parameters.items() if parameter is not None]:
            module._parameters[name] = ours[f"{path}.{name}"]


class _Decision(nn.Module):
    """A stock layer below a routed one, and how surprising each token was to it."""

    def __init__(self, whole: NaiveModel, stock: Any, ours: Any) -> None:
        super().__init__()
        self.whole, self.stock, self.ours = (whole,), stock, (ours,)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        (whole,), (ours,) = self.whole, self.ours
        after = self.stock(hidden_states, **kwargs)
        before = hidden_states if whole.config.prior_input_gradient else hidden_states.detach()
        guess = before + ours.prior(before)
        tokens = list(zip(hidden_states[0], after[0], guess[0], strict=True))
        both = [naive.surprise(*each) for each in tokens]
        whole.surprise = [static for static, _ in both], [change for _, change in both]
        errors = [naive.surprise(x, y.detach(), prior)[1] for x, y, prior in tokens]
        whole.note("prior error", id(self), errors[whole.config.sink_tokens :])
        return after


class _Routed(nn.Module):
    """A stock layer that only some tokens enter."""

    def __init__(self, whole: NaiveModel, stock: Any, ours: Any) -> None:
        super().__init__()
        self.whole, self.stock, self.ours = (whole,), stock, (ours,)

    def choose(self, ranked: list[Tensor]) -> list[int]:
        """The tokens that enter."""
        (whole,), (ours,) = self.whole, self.ours
        config, share = whole.config, whole.capacities[ours.layer_idx]
        if config.architecture == "layerdrop":
            return list(range(len(ranked))) if share else []
        scores = [float(score.detach()) for score in ranked]
        if whole.mode == "topk":
            return naive.select_topk(scores, share, config.sink_tokens)
        trained = config.layer_capacities()[ours.layer_idx]
        threshold = float(ours.router.threshold_at(whole.mode, share, trained))
        return naive.select_threshold(scores, threshold, config.sink_tokens)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        (whole,), (ours,) = self.whole, self.ours
        config, x = whole.config, hidden_states[0]
        scores, gates = TWINS[config.way](x, ours.router, whole)
        guesses = None if ours.predictor is None else list(ours.predictor(x))
        chosen = self.choose(guesses if whole.mode == "predictor" and guesses is not None else scores)
        positions, keys = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.bool)
        keys[list(range(len(x))) if config.kv_tokens == "all" or config.architecture == "layerdrop" else chosen] = True
        back = positions.unsqueeze(1) - positions
        window = config.window(ours.layer_idx)
        visible = (back == 0) | ((back > 0) & keys & (back < (window or len(x))))
        updated = self.stock(hidden_states, attention_mask=visible[None, None], **kwargs)[0]

        def skip(token: Tensor) -> Tensor:
            return token if config.bypass == "identity" else token + ours.forecast(token[None])[0]

        if guesses is not None:
            whole.note("predictor", id(self), [(p, t in chosen) for t, p in enumerate(guesses)])
        for t in range(config.sink_tokens, len(x)):
            update = (updated[t] - x[t]).detach()
            guess = skip(x[t].detach()) - x[t].detach()
            if config.bypass == "forecast":
                whole.note("miss", id(self), [naive.forecast_miss(update, guess)])
            if config.way in ("update_size", "forecast_error"):
                lost = naive.cost(update, guess.detach() if config.way == "forecast_error" else None)
                whole.note("cost", id(self), [(scores[t], lost, 1.0)])
        taken = naive.routed_layer(x, chosen, gates, lambda _, places: updated[places], config.gate, skip)
        return taken[None]
