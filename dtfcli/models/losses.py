"""What training minimizes: next-token cross-entropy, and what routing adds to it.

The cross-entropy never holds the vocabulary logits of a whole batch.

Shapes: N tokens with a target, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .outputs import RoutedModelOutput
from .router import Router, selection_loss
from .routing import masked_mean

IGNORE_INDEX = -100

CHUNK_ELEMENTS = 2**27
"""Logits held at once: 256 MiB in bfloat16. Each chunk adds into the head's whole gradient, so chunks must be few."""

_SLICE_ELEMENTS = 2**19
"""Logits that are normalized at once on a CPU: 2 MiB in float32, so that all passes over them stay in its cache."""

_SLICE_ELEMENTS_GPU = 2**26
"""The same on other devices: 256 MiB of probabilities in float32."""


class _LinearLosses(torch.autograd.Function):
    """Sums over tokens of losses of the logits hidden_n · weightᵀ; see `linear_losses`.

    Their gradient with respect to the logits is known as soon as the logits are. So the gradients of both factors are
    formed in the forward pass and the logits are dropped: no recomputation, three matrix products in all.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, into_gradient: Callable[..., Tensor], elements: int
    ) -> Tensor:
        dtype = product_dtype(hidden_ND)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        weight, sums, grad_weight = weight_VD.to(dtype), list[Tensor](), None
        grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        rows = max(1, elements // weight_VD.shape[0])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, max(1, hidden_ND.shape[0]), rows):
                chunk = slice(start, start + rows)
                hidden = hidden_ND[chunk].to(dtype)
                logits = hidden @ weight.t()
                sums.append(into_gradient(logits, chunk, needs_hidden or needs_weight))
                if grad_hidden is not None:
                    grad_hidden[chunk] = logits @ weight
                if needs_weight:
                    # One chunk's product keeps its type; several are summed in float32.
                    product = logits.t() @ hidden
                    grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return torch.stack(sums).sum(0)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_hidden, grad_weight), grad_loss = ctx.saved_tensors, grad_sums[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            whole = grad_weight.to(grad_loss.dtype)
            # The head's gradient is as large as all logits of a small batch: a fresh copy is scaled in place.
            scaled = whole * grad_loss if whole is grad_weight else whole.mul_(grad_loss)
            grad_weight = scaled.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def linear_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    into_gradient: Callable[[Tensor, slice, bool], Tensor],
    elements: int | None = None,
) -> Tensor:
    """Sums over tokens of losses of the logits hidden_n · weightᵀ, a few rows of logits at a time.

    Args:
        hidden_ND: [N, D].
        weight_VD: [V, D], of the language-model head.
        into_gradient: takes logits, their rows, and whether a gradient is needed; returns the sums, float32 [K], and
            overwrites the logits with the gradient of the first.
        elements: of logits held at once; None: `CHUNK_ELEMENTS`.

    Returns:
        float32 [K]; gradients flow through the first alone.
    """
    sums: Tensor = _LinearLosses.apply(hidden_ND, weight_VD, into_gradient, elements or CHUNK_ELEMENTS)
    return sums


def product_dtype(x: Tensor) -> torch.dtype:
    """The precision of a product with it: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _cross_entropy_into_gradient(logits_NV: Tensor, labels_N: Tensor, with_gradient: bool) -> Tensor:
    """Sum of the cross-entropies, float32 [1]; overwrites the logits with their gradient, softmax − one-hot.

    On a CPU a few rows at a time: the float32 copy of a slice, its maximum, exponentials and sum never leave the cache.
    """
    loss, cpu = logits_NV.new_zeros(1, dtype=torch.float32), logits_NV.device.type == "cpu"
    rows = slice_rows(logits_NV)
    for logits, labels in zip(logits_NV.split(rows), labels_N.split(rows), strict=True):
        counted, targets = (labels != IGNORE_INDEX).float(), labels.clamp(min=0).unsqueeze(1)
        values = logits.float() if cpu else logits  # a copy in the cache makes the passes over it faster
        probabilities = values.softmax(1, dtype=torch.float32)
        # ln Σ exp by the largest logit and its probability, which is at least 1 / V.
        log_total = values.amax(1).float() - probabilities.amax(1).log()
        loss += ((log_total - values.gather(1, targets).squeeze(1).float()) * counted).sum()
        if with_gradient:
            probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0))
            logits.copy_(probabilities.mul_(counted.unsqueeze(1)))
    return loss


def slice_rows(logits_NV: Tensor) -> int:
    """How many rows of logits are normalized at once."""
    elements = _SLICE_ELEMENTS if logits_NV.device.type == "cpu" else _SLICE_ELEMENTS_GPU
    return max(1, elements // logits_NV.shape[1])


class _TiedEmbedding(torch.autograd.Function):
    """(rows of the weight, the weight as the head's): one gradient instead of two that are added.

    An embedding's own gradient is as large as the head's and zero but for the rows of the tokens. The loss hands over
    a fresh gradient of the head; these rows are added to it in place.
    """

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, input_ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input_ids)
        ctx.padding_idx = padding_idx
        return F.embedding(input_ids, weight_VD), weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_head: Tensor) -> tuple[Tensor, None, None]:
        ids, rows = ctx.saved_tensors[0].flatten(), grad_rows.flatten(0, -2).to(grad_head.dtype)
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.padding_idx).unsqueeze(1), 0.0)
        # Repeated tokens are added in a fixed order by index_add_ on a CPU alone, by index_put_ on GPUs alone.
        if grad_head.device.type == "cpu":
            return grad_head.index_add_(0, ids, rows), None, None
        return grad_head.index_put_((ids,), rows, accumulate=True), None, None


def embedded_with_head(embedding: Any, head: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of tokens, and the head's weight for `causal_lm_loss` and nothing else.

    Args:
        embedding, head: the modules; where they share one trainable weight, the two results have one gradient.
        input_ids: int64 [B, T].

    Returns:
        [B, T, D] and [V, D].
    """
    tied = type(embedding) is nn.Embedding and head.weight is embedding.weight and embedding.max_norm is None
    if tied and not _is_hooked(embedding) and torch.is_grad_enabled() and head.weight.requires_grad:
        return _TiedEmbedding.apply(embedding.weight, input_ids, embedding.padding_idx)
    return embedding(input_ids), head.weight


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see the module called: by a hook, or by a forward of his own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, kind) for kind in kinds)


def for_head(hidden_states: Tensor, config: Any) -> Tensor:
    """The last hidden states as the head takes them: Granite divides its logits, and smaller states say the same."""
    scale = getattr(config, "logits_scaling", None)
    return hidden_states if scale is None else hidden_states / scale


def causal_lm_loss(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy of each next token, in nats.

    Args:
        hidden_states: [B, T, D], the last hidden states; position t predicts label t + 1.
        weight: [V, D], of the language-model head, maybe from `embedded_with_head`.
        labels: [B, T] int64, not shifted; -100 is ignored.
        num_items_in_batch: divide the sum by this number (targets in a whole update) instead of by the number of
            targets here.

    Returns:
        0-d float32 tensor.
    """
    hidden = hidden_states[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(hidden.device)
    (total,) = linear_losses(
        hidden,
        weight,
        lambda logits, rows, with_gradient: _cross_entropy_into_gradient(logits, targets[rows], with_gradient),
    )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def reference_causal_lm_loss(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, with whole logits: what `causal_lm_loss` is tested against."""
    logits = F.linear(hidden_states[:, :-1], weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def auxiliary_losses(
    config: Any, routers: Mapping[int, Router], outputs: RoutedModelOutput, share: Tensor | float = 1.0
) -> dict[str, Tensor | None]:
    """The auxiliary losses of one pass: means over tokens and layers, 0-d float32; None: there is no such loss.

    Args:
        config: of the model.
        routers: by layer index; each adds what it learns from (`Router.loss`).
        outputs: what the stack returned.
        share: of the step that this batch is: what its means are multiplied by.

    Returns:
        "prior_loss", the prior error (3.5) of the decision layers, unweighted; "router_loss" of routers and predictors,
        weighted and summed; "forecast_loss", the relative squared error of the forecasts, unweighted.
    """
    prior = router = forecast = None
    if outputs.prior_errors:
        counted = outputs.is_token
        if outputs.sinks is not None:
            counted = ~outputs.sinks if counted is None else counted & ~outputs.sinks
        prior = torch.stack([masked_mean(error, counted) for error in outputs.prior_errors]).mean() * share
    records = outputs.routing or ()
    terms = [term for record in records for term in routers[record.layer].loss(record, outputs.is_token)]
    terms += [
        config.predictor_loss_weight * selection_loss(record.predictor_logits, record.selected, outputs.is_token)
        for record in records
        if record.predictor_logits is not None
    ]
    if terms:
        router = torch.stack(terms).sum() / len(records) * share
    misses = [(r.miss, r.weight) for r in records if r.miss is not None and r.weight is not None]
    if misses:  # layers that nobody entered say nothing
        known = torch.stack([weight.any() for _, weight in misses]).sum().clamp(min=1)
        forecast = torch.stack([masked_mean(miss, weight) for miss, weight in misses]).sum() / known * share
    return {"prior_loss": prior, "router_loss": router, "forecast_loss": forecast}
