"""How far two ways of routing the same tokens agree."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Overlap:
    """Two decisions about the same tokens, counted.

    Attributes:
        both, first_only, second_only, neither: tokens routed by both ways, by one alone, by none.
    """

    both: int = 0
    first_only: int = 0
    second_only: int = 0
    neither: int = 0

    @classmethod
    def of(cls, first: Flags, second: Flags) -> "Overlap":
        """Count two bool [T]."""
        cells = (first & second, first & ~second, ~first & second, ~first & ~second)
        return cls(*(int(cell.sum()) for cell in cells))

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(
            self.both + other.both,
            self.first_only + other.first_only,
            self.second_only + other.second_only,
            self.neither + other.neither,
        )

    @property
    def tokens(self) -> int:
        """All counted tokens."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def same(self) -> float:
        """Share of tokens with the same decision; 1 without tokens."""
        return (self.both + self.neither) / self.tokens if self.tokens else 1.0

    @property
    def jaccard(self) -> float:
        """Tokens routed by both ways over those routed by either; 1 when neither routes any."""
        either = self.both + self.first_only + self.second_only
        return self.both / either if either else 1.0

    @property
    def shares(self) -> tuple[float, float]:
        """Routed share of each way; 0 without tokens."""
        if not self.tokens:
            return 0.0, 0.0
        return (self.both + self.first_only) / self.tokens, (self.both + self.second_only) / self.tokens

    @property
    def kappa(self) -> float | None:
        """Cohen's κ: agreement beyond what two independent choices with these shares would have.

        1 is full agreement, 0 chance; None where chance alone agrees fully (all tokens or none routed by both).
        """
        first, second = self.shares
        chance = first * second + (1 - first) * (1 - second)
        return None if chance == 1 else (self.same - chance) / (1 - chance)

    def to_dict(self) -> dict[str, Any]:
        """Counts and figures, for JSON."""
        figures = {name: getattr(self, name) for name in ("tokens", "same", "jaccard", "kappa")}
        return figures | dict(zip(("first_share", "second_share"), self.shares, strict=True))


@dataclass(frozen=True)
class Agreement:
    """Agreement of two ways of routing, for each routed layer and in sum.

    Attributes:
        first, second: the two routing modes.
        layers: by index.
    """

    first: str
    second: str
    layers: dict[int, Overlap]

    @property
    def overall(self) -> Overlap:
        """All layers together."""
        return sum(self.layers.values(), Overlap())

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(
            self.first, self.second, {layer: overlap + other.layers[layer] for layer, overlap in self.layers.items()}
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "overall": self.overall.to_dict(),
            "layers": [{"layer": layer} | overlap.to_dict() for layer, overlap in self.layers.items()],
        }
