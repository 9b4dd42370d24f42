"""Distillation from the dense parent: the divergence from the predictions of the base before it was routed.

Logits of neither model are ever whole: as in the language-model loss, a few rows are formed, compared, turned into
gradients and dropped. Shapes: N tokens with a target, D hidden size, V vocabulary.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtfcli.models.conversion import to_dense
from dtfcli.models.losses import IGNORE_INDEX
from dtfcli.models.pretrained import is_routed
from dtfcli.settings.training import DistillSettings

_CHUNK_ELEMENTS = 2**24
"""Logits of each of the two models held at once (float32, 64 MiB)."""


class Distillation:
    """A frozen parent and the losses that compare a model with it.

    No module, so that whatever saves, shards or optimizes the model does not see the parent.
    """

    def __init__(self, parent: Any, settings: DistillSettings) -> None:
        self.parent = parent
        self.settings = settings

    def __call__(
        self, hidden_states: Tensor, head: Tensor, input_ids: Tensor, labels: Tensor, targets: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compare one micro-batch.

        Args:
            hidden_states: the model's last ones, [B, T, D].
            head: its language-model head, [V, D].
            input_ids: int64 [B, T], read by both models; rows without padding.
            labels: int64 [B, T], not shifted; -100 where nothing is predicted.
            targets: targets in the whole step: the losses are sums over it.

        Returns:
            The term to add to the loss, weights applied; T² · KL(parent ‖ model), nats; the mean squared difference of
            the final hidden states, or None where it is not computed.
        """
        settings = self.settings
        with torch.no_grad():
            parents = self.parent.model(input_ids=input_ids, use_cache=False).last_hidden_state
        counted = labels[:, 1:].flatten() != IGNORE_INDEX
        ours, theirs = (states[:, :-1].flatten(0, 1) for states in (hidden_states, parents))
        head_of_parent = self.parent.lm_head.weight
        divergence = _LinearDivergenceSum.apply(ours, head, theirs, head_of_parent, counted, settings.temperature)
        divergence = divergence / targets
        total, hidden = settings.weight * divergence, None
        if settings.hidden_weight:
            squares = F.mse_loss(ours.float(), theirs.float(), reduction="none").mean(1)
            hidden = (squares * counted).sum() / targets
            total = total + settings.hidden_weight * hidden
        return total, divergence, hidden


def dense_parent(model: Any, *, share: bool, dtype: torch.dtype) -> Any:
    """The dense model inside one that is about to be trained, frozen and in eval mode.

    Args:
        model: routed or dense, with the weights of its base, on its device, without adapters yet.
        share: use the model's own tensors, for a backbone that will stay frozen; else a second copy is made.
        dtype: of that copy's weights.
    """
    if is_routed(model):
        parent = to_dense(model, copy=not share)
    elif share:
        # Copies the modules around the very same parameters.
        parent = copy.deepcopy(model, {id(p): torch.nn.Parameter(p.data, False) for p in model.parameters()})
    else:
        parent = copy.deepcopy(model)
    parent.requires_grad_(False)
    if not share:
        for parameter in parent.parameters():
            parameter.data = parameter.data.to(dtype)
    return parent.eval()


class _LinearDivergenceSum(torch.autograd.Function):
    """Σ_n T² · KL(softmax(t_n / T) ‖ softmax(s_n / T)), s and t being the logits of model and parent.

    The gradient with respect to s_n is T · (softmax(s_n / T) − softmax(t_n / T)): known in the forward pass, where
    the products with hidden states and head are taken, and the logits dropped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        parents_ND: Tensor,
        parents_head_VD: Tensor,
        counted_N: Tensor,
        temperature: float,
    ) -> Tensor:
        device_type = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_ND.dtype
        head, parents_head = head_VD.to(dtype), parents_head_VD.to(dtype)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if needs_head else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        rows = max(1, _CHUNK_ELEMENTS // head_VD.shape[0])
        with torch.autocast(device_type, enabled=False):
            for start in range(0, hidden_ND.shape[0], rows):
                chunk = slice(start, start + rows)
                hidden, counted = hidden_ND[chunk].to(dtype), counted_N[chunk].unsqueeze(1)
                parents = parents_ND[chunk].to(dtype)
                log_model = F.log_softmax((hidden @ head.t()).float().div_(temperature), dim=1)
                log_parent = F.log_softmax((parents @ parents_head.t()).float().div_(temperature), dim=1)
                parent = log_parent.exp()
                total += temperature**2 * (parent * log_parent.sub_(log_model) * counted).sum()
                if grad_hidden is None and grad_head is None:
                    continue
                grad_logits = log_model.exp_().sub_(parent).mul_(temperature * counted).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (grad_logits @ head).to(grad_hidden.dtype)
                if grad_head is not None:
                    grad_head += grad_logits.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_total).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None, None
