"""The losses of a training step, the same for routed and dense models.

The wrapper is the module that `accelerate` prepares: one forward gives every loss, so that autocast, gradient reduction
and sharding cover all of them. Logits of backbones that we know are never held whole.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from dtfcli.models.configuration_routed_mlp import PREFIX
from dtfcli.models.cost import cost_loss
from dtfcli.models.families import FAMILIES
from dtfcli.models.losses import IGNORE_INDEX, causal_lm_loss, embedded_with_head, for_head
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM
from dtfcli.models.pretrained import is_routed
from dtfcli.models.routing import masked_mean
from dtfcli.training.distillation import Distillation

STATISTICS = {"gate": "gate", "s_ce": "s_ce", "s_cu": "s_cu", "d_st": "static_surprise", "d_ch": "change_surprise"}
"""Metric name → field of a routing record whose mean it is."""
LEARNT = {"forecast_miss": "miss", "cost": "cost"}
"""The same for means over the tokens whose update is known."""


class Losses(NamedTuple):
    """One micro-batch's part of a step: summed over its micro-batches, each field is the step's mean."""

    loss: Tensor
    """The loss to backpropagate: `lm_loss` plus, while training, the weighted auxiliary losses."""
    lm_loss: Tensor
    """Next-token cross-entropy, nats."""
    prior_loss: Tensor | None = None
    """Unweighted prior loss (surprise)."""
    router_loss: Tensor | None = None
    """Weighted auxiliary losses of the router (MoD)."""
    forecast_loss: Tensor | None = None
    """Unweighted relative squared error of the forecasts."""
    distill_loss: Tensor | None = None
    """Unweighted divergence from the dense parent, while training with distillation."""
    routing: dict[str, Tensor] | None = None
    """`router/<layer>/<statistic>`, where asked for."""

    def parts(self) -> dict[str, Tensor]:
        """The auxiliary losses that there are, by name."""
        auxiliary = self._asdict().items()
        return {name: x for name, x in auxiliary if x is not None and name not in ("loss", "lm_loss", "routing")}


class Objective(nn.Module):
    """A causal language model with its training losses.

    Attributes:
        model: a routed model, or a stock one.
        routed: which of the two.
        blocks: whether it is routed by blocks: they train by top-K, and track their thresholds. MLPs do not.
        scores: of routed MLPs in training, float32 [N] a pass, by layer; for whoever takes them.
        distillation: the dense parent that the model also learns from, or None.
    """

    def __init__(self, model: Any, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.routed = is_routed(model)
        self.blocks = self.routed and not isinstance(model, RoutedCausalLM)
        self.scores: dict[int, list[Tensor]] = {}
        self.distillation = distillation
        self._last_hidden: Tensor | None = None
        if distillation is not None and self.blocks:
            model.model.register_forward_hook(self._keep_last_hidden)

    def _keep_last_hidden(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """A model routed by blocks does not return the input of its head."""
        self._last_hidden = output.last_hidden_state if self.training else None

    def forward(
        self, input_ids: Tensor, targets: float, output_routing: bool = False, labels: Tensor | None = None
    ) -> Losses:
        """Losses of one micro-batch of rows without padding.

        Args:
            input_ids: int64 [B, T].
            targets: targets in the whole step: every loss is a sum over it, the auxiliary ones scaled alike.
            output_routing: also return routing statistics.
            labels: int64 [B, T], not shifted, -100 where there is no target; None: each token but the first of a row.
        """
        labels = input_ids if labels is None else labels
        taught = self.distillation if self.training else None
        if self.blocks:
            output = self.model(
                input_ids=input_ids,
                labels=labels,
                num_items_in_batch=targets,
                output_routing=output_routing,
                output_logits=False,
                use_cache=False,
            )
            losses = Losses(output.loss, output.lm_loss, output.prior_loss, output.router_loss, output.forecast_loss)
            records, last_hidden, self._last_hidden = output.routing, self._last_hidden, None
            if taught is not None:
                assert last_hidden is not None, "the hook has seen it"
                learned = taught(last_hidden, self.model.lm_head.weight, input_ids, labels, targets, lm_weight=0.0)
                rest = output.loss + (taught.settings.lm_weight - 1.0) * output.lm_loss
                losses = losses._replace(loss=rest + learned.loss, distill_loss=learned.divergence)
        else:
            with self.model.recorded() if self.routed and self.training else nullcontext([]) as records:
                losses = self._stock_losses(input_ids, labels, targets, taught)
            for record in records:
                self.scores.setdefault(record.layer, []).append(record.scores.flatten())
        if self.routed and output_routing:
            share = (labels[:, 1:] != IGNORE_INDEX).sum() / targets
            losses = losses._replace(routing=routing_statistics(records, share))
        return losses

    def _stock_losses(self, input_ids: Tensor, labels: Tensor, targets: float, taught: Distillation | None) -> Losses:
        """Losses of a stock forward pass; arguments as above, and the parent that teaches, or None."""
        model = self.model
        if model.config.model_type.removeprefix(PREFIX) not in FAMILIES:  # its logits may be more than a product
            if taught is None:
                output = model(input_ids=input_ids, labels=labels, num_items_in_batch=targets, use_cache=False)
                return Losses(output.loss, output.loss)
            learned = taught.of_logits(model, input_ids, labels, targets)
        else:
            embedded, head = embedded_with_head(model.model.embed_tokens, model.lm_head, input_ids)
            hidden_states = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            if taught is None:
                lm_loss = causal_lm_loss(for_head(hidden_states, model.config), head, labels, targets)
                return Losses(lm_loss, lm_loss)
            learned = taught(hidden_states, head, input_ids, labels, targets)
        return Losses(learned.loss, learned.lm_loss, distill_loss=learned.divergence)


def routing_statistics(records: Any, share: float | Tensor) -> dict[str, Tensor]:
    """Means over the tokens of unpadded rows, times `share`, as 0-d tensors without gradient.

    Args:
        records: a `RoutingRecord` or `MLPRecord` for each routed layer.
        share: the micro-batch's share of the step.

    Returns:
        `router/<layer>/<statistic>` → value. score_std is within the micro-batch. The predictor's accuracy, precision
        and recall compare its guess with the tokens that top-K takes.
    """
    statistics = {}
    for record in records:
        prefix = f"router/{record.layer}/"
        scores = record.scores.detach()
        statistics[prefix + "score_mean"] = scores.mean() * share
        statistics[prefix + "score_std"] = scores.std(correction=0) * share
        statistics[prefix + "routed_share"] = record.selected.float().mean() * share
        for name, field in STATISTICS.items():
            values = getattr(record, field, None)
            if values is not None:
                statistics[prefix + name] = values.detach().mean() * share
        if getattr(record, "weight", None) is not None:
            for name, field in LEARNT.items():
                values = getattr(record, field)
                if values is not None:
                    statistics[prefix + name] = masked_mean(values.detach(), record.weight) * share
            if record.cost is not None:
                statistics[prefix + "cost_error"] = cost_loss(scores, record.cost, record.weight) * share
        if getattr(record, "predictor_logits", None) is not None:
            guessed, selected = record.predictor_logits.detach() > 0, record.selected
            both = (guessed & selected).sum()
            statistics[prefix + "predictor_accuracy"] = (guessed == selected).float().mean() * share
            statistics[prefix + "predictor_precision"] = both / guessed.sum().clamp(min=1) * share
            statistics[prefix + "predictor_recall"] = both / selected.sum().clamp(min=1) * share
    return statistics
