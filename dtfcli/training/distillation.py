"""Distillation from the dense parent: the divergence from the predictions of the base before it was routed.

Logits of backbones that we know are never whole: as in the language-model loss, a few rows are formed, compared,
turned into gradients and dropped. Shapes: N tokens with a target, D hidden size, V vocabulary.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtfcli.models.conversion import to_dense
from dtfcli.models.losses import IGNORE_INDEX, for_head, linear_losses, product_dtype, slice_rows
from dtfcli.models.pretrained import is_routed
from dtfcli.settings.training import DistillSettings

_CHUNK_ELEMENTS = 2**24
"""Logits of each of the two models held at once (float32, 64 MiB)."""


class Distilled(NamedTuple):
    """What one micro-batch gives; sums over its targets, divided by the targets of the whole step."""

    loss: Tensor
    """The next two, weighted."""
    lm_loss: Tensor
    """Next-token cross-entropy, nats."""
    divergence: Tensor
    """T² · KL(parent ‖ model), nats."""


class Distillation:
    """A frozen parent and the losses that compare a model with it.

    No module, so that whatever saves, shards or optimizes the model does not see the parent.
    """

    def __init__(self, parent: Any, settings: DistillSettings) -> None:
        self.parent = parent
        self.settings = settings

    def __call__(
        self,
        hidden_states: Tensor,
        head: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        targets: Tensor | float,
        lm_weight: float | None = None,
    ) -> Distilled:
        """Compare one micro-batch.

        Args:
            hidden_states: the model's last ones, [B, T, D].
            head: its language-model head, [V, D].
            input_ids: int64 [B, T], read by both models; rows without padding.
            labels: int64 [B, T], not shifted; -100 where nothing is predicted.
            targets: targets in the whole step.
            lm_weight: of the cross-entropy; None: the settings'.
        """
        settings = self.settings
        with torch.no_grad():
            parents = self.parent.model(input_ids=input_ids, use_cache=False).last_hidden_state
        targets_N = labels[:, 1:].flatten()
        ours, theirs = (states[:, :-1].flatten(0, 1) for states in (hidden_states, parents))
        config, parents_head = self.parent.config, self.parent.lm_head.weight.to(product_dtype(ours))
        weights = (settings.lm_weight if lm_weight is None else lm_weight, settings.weight, settings.temperature)
        ours, theirs = for_head(ours, config), for_head(theirs, config)

        def into_gradient(logits: Tensor, rows: slice, with_gradient: bool) -> Tensor:
            parents_logits = theirs[rows].to(logits.dtype) @ parents_head.t()
            return _losses_into_gradient(logits, parents_logits, targets_N[rows], weights)

        total, lm_loss, divergence = linear_losses(ours, head, into_gradient, _CHUNK_ELEMENTS)
        return Distilled(total / targets, lm_loss.detach() / targets, divergence.detach() / targets)

    def of_logits(self, model: Any, input_ids: Tensor, labels: Tensor, targets: Tensor | float) -> Distilled:
        """The same for any language model, with whole logits."""
        settings = self.settings
        with torch.no_grad():
            parents = self.parent(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        targets_BT, soft = labels[:, 1:], settings.temperature
        lm_loss = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum") / targets
        log_model, log_parent = (F.log_softmax(x[targets_BT != IGNORE_INDEX] / soft, -1) for x in (logits, parents))
        divergence = soft**2 * F.kl_div(log_model, log_parent, log_target=True, reduction="sum") / targets
        return Distilled(settings.lm_weight * lm_loss + settings.weight * divergence, lm_loss, divergence)


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


def _losses_into_gradient(
    logits_NV: Tensor, parents_NV: Tensor, labels_N: Tensor, weights: tuple[float, float, float]
) -> Tensor:
    """Sums of the losses of logits s_n, the parent's being t_n; overwrites s_n with the gradient of the first.

        total       = lm_weight · lm + weight · divergence
        lm          = Σ −ln softmax(s_n)[label_n]
        divergence  = Σ T² · KL(softmax(t_n / T) ‖ softmax(s_n / T))

    The gradients with respect to s_n are softmax(s_n) − one-hot, and T · (softmax(s_n / T) − softmax(t_n / T)). On a
    CPU a few rows at a time, whose passes stay in its cache.

    Returns:
        The three, float32 [3].
    """
    lm_weight, weight, temperature = weights
    lm_loss = divergence = logits_NV.new_zeros((), dtype=torch.float32)
    slices = (each.split(slice_rows(logits_NV)) for each in (logits_NV, parents_NV, labels_N))
    for logits, parents, labels in zip(*slices, strict=True):
        counted, targets = (labels != IGNORE_INDEX).float().unsqueeze(1), labels.clamp(min=0).unsqueeze(1)
        values = logits.float()
        log_model = F.log_softmax(values, dim=1)
        log_soft = log_model if temperature == 1.0 else F.log_softmax(values / temperature, dim=1)
        log_parent = F.log_softmax(parents.float().div_(temperature), dim=1)
        parent = log_parent.exp()
        lm_loss = lm_loss - (log_model.gather(1, targets) * counted).sum()
        divergence = divergence + temperature**2 * (parent * log_parent.sub_(log_soft) * counted).sum()
        gradient = log_soft.exp().sub_(parent).mul_(weight * temperature)
        if lm_weight:
            one_hot = torch.zeros_like(gradient).scatter_(1, targets, 1.0)
            gradient += lm_weight * log_model.exp().sub_(one_hot)
        logits.copy_(gradient.mul_(counted))
    return torch.stack([lm_weight * lm_loss + weight * divergence, lm_loss, divergence])
