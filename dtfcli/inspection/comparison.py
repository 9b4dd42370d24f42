"""Two models on the same tokens: where they spend depth differently, and what each of them pays in loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtfcli.errors import ConfigError
from dtfcli.inspection.agreement import Agreement, agreement_of
from dtfcli.inspection.statistics import GROUPINGS
from dtfcli.inspection.text import TextRouting
from dtfcli.inspection.tokens import short


@dataclass(frozen=True)
class GroupDifference:
    """The tokens of one class, seen by both models.

    Attributes:
        name: of the class.
        tokens: how many, sinks of either model left out.
        first_share, second_share: routed share of each model.
        difference, error: mean of first − second over the tokens, and its (paired) standard error.
        loss_difference, loss_error: the same for the loss, nats, over the tokens that have one.
    """

    name: str
    tokens: int
    first_share: float
    second_share: float
    difference: float
    error: float | None
    loss_difference: float | None
    loss_error: float | None


@dataclass(frozen=True)
class Comparison:
    """Two models, A (`first`) and B (`second`).

    Attributes:
        first, second: what each did; the tokens are the same.
        agreement: of their decisions in the layers that both route; no layers when they share none.
        depth_difference: [T], depth of A − depth of B, each over its number of routed layers.
        loss_difference: [T], loss of A − loss of B, nats; NaN if either has none.
        depth_correlation: Pearson's r of the two depths over tokens; None where one does not vary.
        groups: by token class.
    """

    first: TextRouting
    second: TextRouting
    agreement: Agreement
    depth_difference: NDArray[np.float64]
    loss_difference: NDArray[np.float64]
    depth_correlation: float | None
    groups: list[GroupDifference]

    @property
    def losses(self) -> tuple[float, float] | None:
        """Mean loss of A and of B, nats; None for a text of one token."""
        if np.isnan(self.loss_difference).all():
            return None
        return float(np.nanmean(self.first.loss)), float(np.nanmean(self.second.loss))

    def to_dict(self) -> dict[str, Any]:
        """Everything that is not in the two reports, for JSON."""
        losses = self.losses
        return {
            "first": self.first.model,
            "second": self.second.model,
            "first_routed_share": self.first.routed_share,
            "second_routed_share": self.second.routed_share,
            "first_loss": losses[0] if losses else None,
            "second_loss": losses[1] if losses else None,
            "depth_correlation": self.depth_correlation,
            "agreement": self.agreement.to_dict(),
            "depth_difference": self.depth_difference.tolist(),
            "loss_difference": [None if np.isnan(x) else x for x in self.loss_difference.tolist()],
            "classes": self.groups,
            "second_routing": self.second.to_dict(),
        }


def compare_routing(first: TextRouting, second: TextRouting) -> Comparison:
    """Set two models' routing of one text side by side.

    Raises:
        ConfigError: their tokenizers cut the text differently, so that there are no pairs of tokens.
    """
    if first.source.ids != second.source.ids or first.windows != second.windows:
        raise ConfigError(
            f"--compare {second.model}: {_first_difference(first, second)}; name a model that shares both."
        )
    depth = first.depth_share - second.depth_share
    loss = first.loss - second.loss
    a, b = first.depth_share, second.depth_share
    varies = len(a) > 2 and a.std() > 1e-9 and b.std() > 1e-9
    decisions = [{layer.layer: layer.selected for layer in report.layers} for report in (first, second)]
    return Comparison(
        first=first,
        second=second,
        agreement=agreement_of(first.model, decisions[0], second.model, decisions[1]),
        depth_difference=depth,
        loss_difference=loss,
        depth_correlation=float(np.corrcoef(a, b)[0, 1]) if varies else None,
        groups=_groups(first, second, depth, loss),
    )


def _first_difference(first: TextRouting, second: TextRouting) -> str:
    """Why two reports cannot be paired token by token."""
    for i, (a, b) in enumerate(zip(first.source.ids, second.source.ids, strict=False)):
        if a != b:
            pieces = f"'{short(first.source.pieces[i])}' (id {a}) against '{short(second.source.pieces[i])}' (id {b})"
            return f"its tokenizer is another one; token {i} is {pieces}"
    if len(first.source) != len(second.source):
        return f"its tokenizer is another one ({len(first.source)} against {len(second.source)} tokens)"
    return "it takes another number of positions, so that the text is cut at other places"


def _groups(
    first: TextRouting, second: TextRouting, depth: NDArray[np.float64], loss: NDArray[np.float64]
) -> list[GroupDifference]:
    counted = ~(first.sinks | second.sinks)
    classes = np.array(first.classes)
    rows = []
    for name in GROUPINGS["class"]:
        chosen = counted & (classes == name)
        if chosen.any():
            with_loss = loss[chosen & ~np.isnan(loss)]
            difference, error = _mean_and_error(depth[chosen])
            loss_difference, loss_error = _mean_and_error(with_loss) if len(with_loss) else (None, None)
            rows.append(
                GroupDifference(
                    name=name,
                    tokens=int(chosen.sum()),
                    first_share=float(first.depth_share[chosen].mean()),
                    second_share=float(second.depth_share[chosen].mean()),
                    difference=difference,
                    error=error,
                    loss_difference=loss_difference,
                    loss_error=loss_error,
                )
            )
    return rows


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float | None]:
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error
