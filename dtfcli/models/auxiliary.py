"""What training minimizes beside the language-model loss: losses of priors, forecasts, routers and predictors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .outputs import RoutedModelOutput, RoutingRecord
from .routing import cost_loss, masked_mean


class AuxiliaryLosses(NamedTuple):
    """Means over tokens and layers, 0-d float32; None: there is no such loss."""

    prior: Tensor | None
    """Prior error (3.5) of the decision layers, unweighted."""
    router: Tensor | None
    """Of routers and predictors, weighted and summed."""
    forecast: Tensor | None
    """Relative squared error of the forecasts, unweighted."""

    def added_to(self, lm_loss: Tensor, config: Any) -> Tensor:
        """The loss to minimize."""
        loss = lm_loss
        if self.prior is not None:
            loss = loss + config.prior_loss_weight * self.prior
        if self.router is not None:
            loss = loss + self.router
        if self.forecast is not None:  # times 0, too: several processes count on every parameter's gradient
            loss = loss + config.forecast_loss_weight * self.forecast
        return loss


def auxiliary_losses(config: Any, outputs: RoutedModelOutput, share: Tensor | float = 1.0) -> AuxiliaryLosses:
    """The auxiliary losses of one pass.

    Args:
        config: of the model.
        outputs: what the stack returned.
        share: of the update that this batch is: what its means are multiplied by.
    """
    prior = router = forecast = None
    if outputs.prior_errors:
        counted = outputs.real
        if outputs.sinks is not None:
            counted = ~outputs.sinks if counted is None else counted & ~outputs.sinks
        prior = torch.stack([masked_mean(error, counted) for error in outputs.prior_errors]).mean() * share
    records = outputs.routing or ()
    terms = [term for record in records for term in _router_terms(config, record, outputs.real)]
    if terms:
        router = torch.stack(terms).sum() / len(records) * share
    misses = [(r.miss, r.weight) for r in records if r.miss is not None and r.weight is not None]
    if misses:  # layers that nobody entered say nothing
        known = torch.stack([weight.any() for _, weight in misses]).sum().clamp(min=1)
        forecast = torch.stack([masked_mean(miss, weight) for miss, weight in misses]).sum() / known * share
    return AuxiliaryLosses(prior, router, forecast)


def _router_terms(config: Any, record: RoutingRecord, real: Tensor | None) -> list[Tensor]:
    """Weighted losses of one routed layer.

    MoD's score against its own top-K mask, and for its size; a predicted cost against the true one; the predictor's
    logits against the mask.
    """
    mask = record.selected.float()
    terms = []
    if config.architecture == "mod" and config.router_aux_loss_weight:
        against_mask = binary_cross_entropy_with_logits(record.scores, mask, reduction="none")
        terms.append(config.router_aux_loss_weight * masked_mean(against_mask, real))
    if config.architecture == "mod" and config.router_z_loss_weight:
        terms.append(config.router_z_loss_weight * masked_mean(record.scores.square(), real))
    if record.cost is not None and record.weight is not None:
        terms.append(cost_loss(record.scores, record.cost, record.weight))
    if record.predictor_logits is not None:
        guessed = binary_cross_entropy_with_logits(record.predictor_logits, mask, reduction="none")
        terms.append(config.predictor_loss_weight * masked_mean(guessed, real))
    return terms
