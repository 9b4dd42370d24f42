"""What a fit of routed MLPs knows beforehand, from a few thousand tokens that all enter all MLPs.

How much an error changes the loss; which neurons a forecast keeps; how layers share γ; and rough scores. Shape suffixes
as in `modeling_routed_mlp`. Everything is float32.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .least_squares import CHUNK, TINY, Normal
from .modeling_routed_mlp import GRID, RoutedMLP, decoder_layers, inner_linears, routed_mlps

_EFFECT_RIDGE = 0.6
"""`RIDGE` of v, whose targets scatter."""
_EFFECT = 0.5
"""β: how much a score heeds the effect of an error on the loss, beside its size."""
_ENTERING, _ENTERING_EVERY = 0.05, 8
"""Weight, in a forecast's fit, of tokens that enter: γ may be another one tomorrow. One in so many stands for all."""
SURVEYED, DIFFERENTIATED = 4096, 2048
"""Tokens of the survey, and of the effects; at least two for each dimension."""
TOGETHER = 256
"""Tokens that are differentiated together: their activations are kept for the backward pass."""
_NOT_FINITE = (
    "layer {}: its MLP gives numbers that are not finite on this text, so nothing can be fitted. "
    "Open the model in another dtype (float32 or bfloat16), or fit it to another text"
)


class Text(NamedTuple):
    """Rows of text, padded on the right."""

    ids: Tensor
    """int64 [B, T]."""
    mask: Tensor
    """bool [B, T]: which are no padding."""

    @classmethod
    def of(cls, batches: Iterable[Mapping[str, Tensor]]) -> "Text":
        """Of batches, mappings with "input_ids" [B, T] and, for padded rows, "attention_mask" [B, T].

        Raises:
            ValueError: no batches.
        """
        if not (batches := list(batches)):
            raise ValueError("batches is empty: give it text, some thousand tokens of it")
        ids = [batch["input_ids"] for batch in batches]
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        longest = max(part.shape[1] for part in ids)
        ids, masks = ([F.pad(part, (0, longest - part.shape[1])) for part in parts] for parts in (ids, masks))
        return cls(torch.cat(ids), torch.cat(masks).bool())

    def some(self, tokens: int) -> "Text":
        """Rows of so many tokens, evenly spread."""
        rows = min(len(self.ids), -(-tokens // self.ids.shape[1]))
        chosen = torch.arange(rows) * len(self.ids) // rows
        return Text(self.ids[chosen], self.mask[chosen])

    def chunks(self, tokens: int) -> "list[Text]":
        """Rows of so many tokens at a time."""
        rows = max(1, tokens // self.ids.shape[1])
        return [Text(*parts) for parts in zip(self.ids.split(rows), self.mask.split(rows), strict=True)]

    def passed(self, model: Any) -> "tuple[Tensor, dict[str, Tensor]]":
        """Token ids and the mask as a model takes them: none where nothing is padded."""
        padded = {} if bool(self.mask.all()) else {"attention_mask": self.mask.to(model.device)}
        return self.ids.to(model.device), padded


@torch.no_grad()
def pass_together(model: Any, text: Text, instead: Callable[[RoutedMLP, Tensor, Tensor, Tensor], Tensor]) -> None:
    """One pass of the stack over a whole text, in which routed MLPs do something else.

    Only what one layer hands to the next is held for all tokens.

    Args:
        model: with routed MLPs.
        text: of any number of tokens.
        instead: takes an MLP, x̃ [B, T, D], which tokens are no padding and which come first in their text, bool [B, T]
            each; returns what the MLP hands on, [B, T, D].
    """
    (ids, padded), mask = text.passed(model), text.mask.to(model.device)
    first = mask & (mask.long().cumsum(1) == 1)
    was_training = model.training
    model.eval()
    try:
        rows = max(1, CHUNK // ids.shape[1])
        with model.replaced(lambda mlp, x: instead(mlp, x, mask, first)), _few_rows(model, len(ids), rows):
            model.get_decoder()(input_ids=ids, use_cache=False, **padded)
    finally:
        model.train(was_training)


@contextmanager
def _few_rows(model: Any, batch: int, rows: int) -> Iterator[None]:
    """Parts of decoder layers, but routed MLPs, see so many rows of a batch at a time: inside they hold many copies."""
    layers = decoder_layers(model) if batch > rows else ()
    parts = [part for layer in layers for part in layer.children() if not isinstance(part, RoutedMLP)]
    before = {part: vars(part).get("forward") for part in parts}

    def split(value: Any) -> list[Any]:
        alike = isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch  # one dimension: positions
        if isinstance(value, tuple) and value:
            return list(zip(*map(split, value), strict=True))
        return list(value.split(rows)) if alike else [value] * -(-batch // rows)

    def joined(outputs: Sequence[Any]) -> Any:
        if isinstance(outputs[0], tuple):
            return tuple(map(joined, zip(*outputs, strict=True)))
        rowwise = isinstance(outputs[0], Tensor) and outputs[0].ndim > 1  # else a bias (GPT-NeoX Japanese), or None
        return torch.cat(tuple(outputs)) if rowwise else outputs[0]

    def by_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, dict) for value in kwargs.values()):  # keys that layers share: all rows' or none
                return forward(*args, **kwargs)
            each = zip(split(args), split(tuple(kwargs.values())), strict=True)
            return joined([forward(*some, **dict(zip(kwargs, named, strict=True))) for some, named in each])

        return call

    try:
        for part in parts:
            vars(part)["forward"] = by_rows(part.forward)
        yield
    finally:
        for part, forward in before.items():
            vars(part).pop("forward", None)
            if forward is not None:  # of accelerate, which moves weights
                vars(part)["forward"] = forward


class Effect(NamedTuple):
    """How much an error of what an MLP returns changes the loss; g_t is the loss's gradient with respect to it."""

    square: Tensor
    """E‖g‖², float32 0-d."""
    direction: Tensor
    """v, float32 [D]: v · x̃_t and a constant is the predicted ln ‖g_t‖²."""


@torch.no_grad()
def survey(model: Any, text: Text, effects: Mapping[int, Effect]) -> dict[int, Tensor]:
    """Choose neurons, share γ among layers, and score tokens roughly; returns rough scores by layer, float32 [D].

    Every token enters here. A forecast off by e_t raises the loss by about E[(g_t · e_t)²] / 2, an expectation over
    g. Its estimate, ln ‖e_t‖² + ln E‖g‖² and a constant, has one unit in all layers. One threshold for all of them
    together says which share of the tokens enters each: its γ at the model's γ. First tokens of texts have to enter
    every layer, so no share is below twice theirs; the threshold makes up for it.
    """
    mlps = routed_mlps(model)
    rough, costs = _surveyed(model, text, effects)
    if mlps and model.config.architecture == "dtf" and not isinstance(model.config.capacity, list):
        together = torch.cat(list(costs.values())).sort(descending=True).values
        least = min(1.0, 2 * len(text.ids) / float(text.mask.sum()))

        def shares(count: int) -> Tensor:
            return torch.stack([(cost > together[count]).float().mean().clamp(min=least) for cost in costs.values()])

        for place in range(1, GRID):
            count = bisect_left(range(len(together) - 1), place / GRID, key=lambda count: float(shares(count).mean()))
            for layer, share in zip(costs, shares(count), strict=True):
                mlps[layer].router.shares[place] = share
    return rough


def _surveyed(model: Any, text: Text, effects: Mapping[int, Effect]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Rough scores, float32 [D], and the costs that they predict, float32 [N], by layer; neurons are chosen.

    Every token enters every MLP, one layer after the other, so that one layer's activations are held at a time.
    """
    rough, costs = dict[int, Tensor](), dict[int, Tensor]()

    def look(mlp: RoutedMLP, x: Tensor, counted: Tensor, first: Tensor) -> Tensor:
        y, usual = compute(mlp, x.flatten(0, 1)).view_as(x), counted & ~first
        effect = effects[mlp.layer_idx]
        rough[mlp.layer_idx], cost = _survey_mlp(mlp, x[usual].float(), y[usual].float(), effect)
        costs[mlp.layer_idx] = cost + (effect.square + TINY).log()
        return y

    if effects:
        pass_together(model, text.some(max(SURVEYED, 2 * model.config.hidden_size)), look)
    return rough, costs


def compute(mlp: RoutedMLP, x: Tensor) -> Tensor:
    """MLP(x̃) of all tokens, [N, D] → [N, D], some at a time; ValueError if it is not finite."""
    y = torch.cat([mlp.compute(chunk) for chunk in x.split(CHUNK)])
    if not bool(y.isfinite().all()):
        raise ValueError(_NOT_FINITE.format(mlp.layer_idx))
    return y


def rank_layers(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> list[int]:
    """Routed layers, the one first that costs most if no token enters its MLP: an order for `layerdrop`."""
    text = Text.of(batches)
    for mlp in routed_mlps(model).values():
        mlp.capacity = 0.0  # so the forecast is fitted to all tokens
    _, costs = _surveyed(model, text, measure_effects(model, text))
    model.set_routing(capacity=model.capacity_override)
    return sorted(costs, key=lambda layer: float(costs[layer].exp().mean()), reverse=True)


def _survey_mlp(mlp: RoutedMLP, x: Tensor, y: Tensor, effect: Effect) -> tuple[Tensor, Tensor]:
    """Choose the neurons of one MLP; returns a rough score, float32 [D], and the cost that it predicts, float32 [N].

    Args:
        mlp: the MLP.
        x, y: x̃ and MLP(x̃), float32 [N, D].
        effect: of its errors.
    """
    effects = x @ effect.direction
    weight, everywhere = 1 / (y.square().mean(1) + TINY), Normal(x, torch.ones_like(y[:, 0]))
    narrow, rest, rough = mlp.forecast.narrow, y, mlp.router.weight
    kept: Any = slice(None)
    for last in (False, True):
        if last:
            scores = x @ rough
            enters = scores > scores.quantile(1 - mlp.capacity)
            kept, weight = kept_tokens(weight, enters)
            if narrow is not None:
                choose_neurons(mlp, x[kept], weight)
                rest = y - narrow(x.to(mlp.forecast.linear.weight.dtype)).float()
        error = rest - x @ Normal(x[kept], weight).solve(rest[kept])
        cost = token_costs(error.square().mean(1), effects - effects.mean())
        rough = everywhere.solve((cost - cost.mean()).unsqueeze(1)).squeeze(1)
        if mlp.router.random:
            rough = mlp.router.weight
    return rough, x @ rough + cost.mean()


def kept_share(capacity: float) -> float:
    """k, the share of tokens that a forecast is fitted to at γ: see `kept_tokens`."""
    return 1.0 - capacity + capacity / _ENTERING_EVERY


def kept_tokens(weight: Tensor, enters: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens a forecast is fitted to, int64 [M], and their weights, [M].

    All tokens that skip; and a few that enter, at little weight, because γ may be another one tomorrow.
    """
    few = torch.arange(len(weight), device=weight.device) % _ENTERING_EVERY == 0
    kept = ((~enters | few) & (weight > 0)).nonzero().squeeze(1)
    return kept, torch.where(enters, _ENTERING * _ENTERING_EVERY * weight, weight)[kept]


@torch.no_grad()
def measure_effects(model: Any, text: Text) -> dict[int, Effect]:
    """The effect of each MLP's errors, by layer, from some of a text; every token enters."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in routed_mlps(model)}
    trained, was_training = [parameter for parameter in model.parameters() if parameter.requires_grad], model.training
    model.eval().requires_grad_(False)
    try:
        for chunk in text.some(max(DIFFERENTIATED, 2 * model.config.hidden_size)).chunks(TOGETHER):
            for layer, pair in _gradients(model, chunk).items():
                seen[layer].append(pair)
    finally:
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)
    return {layer: _effect(*(torch.cat(parts) for parts in zip(*each, strict=True))) for layer, each in seen.items()}


def _effect(x: Tensor, squares: Tensor) -> Effect:
    """Of x̃ [N, D] and ‖g‖², float32 [N]."""
    logs = (squares + TINY).log()
    logs = logs.clamp(min=logs.quantile(0.02).item())  # what the loss hardly notices is not made out
    direction = Normal(x := x.float(), torch.ones_like(logs)).solve((logs - logs.mean()).unsqueeze(1), _EFFECT_RIDGE)
    return Effect(squares.mean(), direction.squeeze(1))


def _gradients(model: Any, text: Text) -> dict[int, tuple[Tensor, Tensor]]:
    """x̃ [N, D] and ‖g‖², float32 [N], by layer, of the tokens that count; the model draws the labels itself."""
    usual = (text.mask & (text.mask.long().cumsum(1) > 1)).to(model.device)
    outputs: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(mlp: RoutedMLP, x: Tensor) -> Tensor:
        outputs[mlp.layer_idx] = x.detach()[usual], mlp.compute(x)
        return outputs[mlp.layer_idx][1]

    with model.replaced(keep), torch.enable_grad():
        ids, padded = text.passed(model)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False, **padded).logits[usual].float()
        generator = torch.Generator(logits.device).manual_seed(0)
        probabilities = logits.detach().softmax(-1).nan_to_num()
        labels = (probabilities + TINY).multinomial(1, generator=generator).squeeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, [y for _, y in outputs.values()])
    return {
        layer: (x, g[usual].float().square().sum(1))
        for (layer, (x, _)), g in zip(outputs.items(), gradients, strict=True)
    }


def token_costs(squares: Tensor, effects: Tensor) -> Tensor:
    """What a score predicts, c = ln(‖e‖² / D) + β v · x̃, float32 [N]: of a forecast's ‖e‖² / D and v · x̃, [N] each."""
    return (squares + TINY).log() + _EFFECT * effects


def choose_neurons(mlp: RoutedMLP, x: Tensor, weight: Tensor) -> None:
    """Give MLP' the neurons of the MLP that a linear map of x̃ explains least.

    They have the largest Σ_t a_t (h_t − its linear estimate)² ‖its column of the last map‖².

    Args:
        mlp: the MLP, and MLP' in its forecast.
        x: x̃ of some tokens, float32 [N, D].
        weight: a, float32 [N].
    """
    linears, name = inner_linears(mlp, x.shape[1])
    last, narrow = linears[name], mlp.forecast.narrow
    inner: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, args: inner.append(args[0].float()))
    mlp.compute(x.to(last.weight.dtype))
    hook.remove()
    with torch.autocast(x.device.type, enabled=False):
        unexplained = inner[0] - x @ Normal(x, weight).solve(inner[0])
        share = weight @ unexplained.square() * last.weight.float().square().sum(0)
    chosen = share.topk(narrow.get_submodule(name).in_features).indices.sort().values
    for each, linear in linears.items():
        small: Any = narrow.get_submodule(each)
        rows: Any = slice(None)
        if each != name:
            rows = torch.cat([chosen + start for start in range(0, linear.out_features, last.in_features)])
        small.weight.copy_(linear.weight[:, chosen] if each == name else linear.weight[rows])
        if linear.bias is not None:
            small.bias.copy_(linear.bias[rows])
