"""One text through a routed model: for every token the layers that took it, why, and how well it was predicted."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dtfcli.errors import ConfigError
from dtfcli.inspection.agreement import Agreement, agreement_of
from dtfcli.inspection.losses import next_token_losses
from dtfcli.inspection.oracle import OracleRouting, against_oracle
from dtfcli.inspection.token_classes import classify
from dtfcli.inspection.tokens import TokenizedText, tokenize

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

MEASURES = ("score", "gate", "static_surprise", "change_surprise", "s_ce", "s_cu", "ce_part")
"""Per-token fields of a `LayerRouting`; all but the first two are DTF's."""


@dataclass(frozen=True)
class LayerRouting:
    """One routed layer over one text; arrays [T].

    Attributes:
        layer: index in the stack.
        selected: whether the token entered the layer.
        score: what is ranked, and compared with `threshold`.
        gate: the soft gate, G (DTF), σ(r) or r (MoD).
        threshold: of the layer; None in `topk` mode.
        static_surprise, change_surprise, s_ce, s_cu: D_st, D_ch, S_CE, S_CU (DTF), else None.
        ce_part: the share of the score that CE contributed (DTF), see `expected_change_part`.
    """

    layer: int
    selected: Flags
    score: Floats
    gate: Floats
    threshold: float | None = None
    static_surprise: Floats | None = None
    change_surprise: Floats | None = None
    s_ce: Floats | None = None
    s_cu: Floats | None = None
    ce_part: Floats | None = None

    @property
    def routed_share(self) -> float:
        """Share of the tokens that entered the layer."""
        return float(self.selected.mean())

    def measures(self) -> dict[str, Floats]:
        """The per-token figures that this architecture has."""
        found = {name: getattr(self, name) for name in MEASURES}
        return {name: values for name, values in found.items() if values is not None}


Against = Literal["mode", "oracle"]
"""What a model's routing is compared with: the other mode (causal or `topk`), the tokens whose update is largest."""
OTHER_MODE: tuple[Against, ...] = ("mode",)


@dataclass(frozen=True)
class Inspected:
    """Which model was looked at, and how it routed.

    Attributes:
        model: what the model is called.
        architecture, routing, capacity: such as "dtf" or "dense"; the mode; γ, or one for each routed layer.
    """

    model: str
    architecture: str
    routing: str
    capacity: Any

    @property
    def causal(self) -> bool:
        """Whether a token's path depends on nothing after it."""
        return self.routing != "topk"

    def heading(self) -> dict[str, Any]:
        """The above, for JSON and the page."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "routing": self.routing,
            "causal": self.causal,
            "capacity": self.capacity,
        }


def inspected(model: Any, name: str) -> Inspected:
    """What is said about a model that is looked at."""
    return Inspected(name, model.config.architecture, model.routing, model.capacity)


@dataclass(frozen=True)
class TextRouting(Inspected):
    """A text, token by token, and what each routed layer did with it.

    Attributes:
        source: the text and its tokens.
        layers: one entry for each routed layer.
        loss: [T] nats, −ln p(token | the tokens before it in its window); NaN for the first of a window.
        sinks: [T], tokens that are routed always, whatever their score.
        windows: first token of each stretch that the model saw apart, because the text is longer than its positions.
        classes: one of `token_classes.CLASSES` for each token.
        agreement: of this mode with the other one, causal and `topk`; None where one of them is not available.
        oracle: the router against the tokens with the largest update, where it was asked for.
    """

    source: TokenizedText
    layers: list[LayerRouting]
    loss: Floats
    sinks: Flags
    windows: list[int]
    classes: list[str]
    agreement: Agreement | None = None
    oracle: OracleRouting | None = None
    _depth: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_depth", self.selected.sum(0).astype(np.float64))

    @property
    def tokens(self) -> list[str]:
        """The text of each token, with what the tokenizer dropped in front of it."""
        return [gap + piece for gap, piece in zip(self.source.gaps, self.source.pieces, strict=True)]

    @property
    def selected(self) -> Flags:
        """[L, T]: who entered which routed layer."""
        return np.array([layer.selected for layer in self.layers], dtype=bool).reshape(-1, len(self.source))

    @property
    def depth(self) -> list[int]:
        """For each token the number of routed layers that it entered."""
        return [int(depth) for depth in self._depth]

    @property
    def depth_share(self) -> Floats:
        """[T]: depth over the number of routed layers."""
        return self._depth / len(self.layers)

    @property
    def routed_share(self) -> float:
        """Share of tokens over all routed layers."""
        return float(self.depth_share.mean())

    @property
    def positions(self) -> NDArray[np.int64]:
        """[T], counted from 0 in each window."""
        places = np.arange(len(self.source))
        starts = np.asarray(self.windows)
        return places - starts[np.searchsorted(starts, places, side="right") - 1]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: per token and layer."""
        source = self.source
        return self.heading() | {
            "routed_share": self.routed_share,
            "text": source.text,
            "tokens": self.tokens,
            "token_ids": source.ids,
            "starts": source.starts,
            "windows": self.windows,
            "positions": self.positions.tolist(),
            "classes": self.classes,
            "sinks": self.sinks.tolist(),
            "depth": self.depth,
            "loss": [None if math.isnan(value) else value for value in self.loss.tolist()],
            "layers": [
                {
                    "layer": layer.layer,
                    "routed_share": layer.routed_share,
                    "threshold": layer.threshold,
                    "selected": layer.selected.tolist(),
                    **{name: values.tolist() for name, values in layer.measures().items()},
                }
                for layer in self.layers
            ],
        }


def expected_change_part(score: Floats, static: Floats, change: Floats, scalars: dict[str, float]) -> Floats:
    """Which criterion drives a DTF score: the share of it that the expected change contributes, in [0, 1].

    The ranked score −ln(1 − G) is softplus(a) + softplus(b), a = softplus(β_ce) · CE and b = softplus(β_cu) · CU; the
    part is softplus(a) / score. Above one half CE drove the choice, below it CU did. a is taken from D_st and D_ch
    again, since S_CE and S_CU saturate.

    Args:
        score, static, change: [T], the ranked score, D_st and D_ch.
        scalars: o_ce and beta_ce of the layer's router.
    """
    criterion = static - (change - math.log(scalars["o_ce"] + 1e-10))
    expected = np.logaddexp(0.0, np.logaddexp(0.0, scalars["beta_ce"]) * criterion)
    return np.clip(expected / np.maximum(score, np.finfo(np.float64).tiny), 0.0, 1.0)


@torch.inference_mode()
def inspect_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str = "",
    against: Collection[Against] = OTHER_MODE,
) -> TextRouting:
    """Run a text through a routed model, in the model's routing mode, and keep every decision.

    A text longer than the model's positions is cut into windows, each routed on its own.

    Args:
        model: a routed model in eval mode.
        tokenizer: its tokenizer.
        text: any text.
        name: what to call the model.
        against: route again in other ways, and compare.

    Raises:
        ConfigError: the model is dense, or not calibrated for its mode and capacity, or the text is empty; or there is
            no choice of tokens to compare with the oracle's.
    """
    require_routed(model, name)
    if "oracle" in against:
        _require_choice(model)
    source = tokenize(tokenizer, text)
    size = model.config.max_position_embeddings
    windows = list(range(0, len(source), size))
    rows = [source.ids[start : start + size] for start in windows]
    passes = [_forward(model, row) for row in rows]
    layers = [_layer(model, [records[i] for records, _, _ in passes]) for i in range(len(passes[0][0]))]
    return TextRouting(
        **vars(inspected(model, name)),
        source=source,
        layers=layers,
        loss=np.concatenate([loss for _, loss, _ in passes]),
        sinks=np.concatenate([sinks for _, _, sinks in passes]),
        windows=windows,
        classes=classify(source),
        agreement=_other_mode(model, source.ids, size, layers) if "mode" in against else None,
        oracle=against_oracle(model, rows) if "oracle" in against else None,
    )


def require_routed(model: Any, name: str = "") -> None:
    """Refuse a dense model.

    Raises:
        ConfigError: it is one.
    """
    if not hasattr(model, "set_routing"):
        which = f"{name}: this" if name else "this"
        raise ConfigError(f"{which} model is dense: every token takes every layer, so there is no routing to show.")


def _require_choice(model: Any) -> None:
    if model.config.architecture == "layerdrop":
        raise ConfigError(
            "--against-oracle: layerdrop leaves out whole layers, so there is no choice of tokens to compare; name a "
            "dtf, mod or random model."
        )


def _forward(model: Any, ids: list[int]) -> tuple[Any, Floats, Flags]:
    """Routing records, loss [T] and sinks [T] of one window."""
    row = torch.tensor([ids], device=model.device)
    out = _stack(model, row)
    sinks = getattr(out, "sinks", None)
    always = np.zeros(len(ids), dtype=bool) if sinks is None else sinks[0].cpu().numpy()
    return getattr(out, "routing", None) or (), next_token_losses(model, out.last_hidden_state[0], row[0]), always


def _stack(model: Any, row: torch.Tensor) -> Any:
    try:
        return model.model(input_ids=row, use_cache=False)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def _layer(model: Any, records: list[Any]) -> LayerRouting:
    """One layer's records of all windows, joined."""

    def join(name: str, kind: Any = np.float64) -> Any:
        parts = [getattr(record, name) for record in records]
        return None if parts[0] is None else np.concatenate([part[0].cpu().numpy().astype(kind) for part in parts])

    first = records[0]
    score, static, change = join("scores"), join("static_surprise"), join("change_surprise")
    ce_part = None
    if static is not None and model.config.surprise_scale == "raw":
        ce_part = expected_change_part(score, static, change, model.router_scalars()[first.layer])
    elif static is not None:  # in units of its moving average S_CE does not saturate: softplus(a) = −ln(1 − S_CE)
        part = -np.log1p(-np.minimum(join("s_ce"), 1 - 1e-12))
        ce_part = np.clip(part / np.maximum(score, np.finfo(np.float64).tiny), 0.0, 1.0)
    return LayerRouting(
        layer=first.layer,
        selected=join("selected", np.bool_),
        score=score,
        gate=join("gate"),
        threshold=None if first.threshold is None else float(first.threshold),
        static_surprise=static,
        change_surprise=change,
        s_ce=join("s_ce"),
        s_cu=join("s_cu"),
        ce_part=ce_part,
    )


def _other_mode(model: Any, ids: list[int], size: int, layers: list[LayerRouting]) -> Agreement | None:
    """Agreement with `topk`, or with `threshold` for a model that routes by `topk`, at the same capacity.

    None where `threshold` is not calibrated for it.
    """
    other = "threshold" if model.routing == "topk" else "topk"
    mine = {layer.layer: layer.selected for layer in layers}
    with model.routing_mode(other, model.model.capacity_override):
        try:
            passes = [
                _stack(model, torch.tensor([ids[i : i + size]], device=model.device)) for i in range(0, len(ids), size)
            ]
        except ConfigError:
            return None
    theirs = {
        layer: np.concatenate([out.routing[i].selected[0].cpu().numpy() for out in passes])
        for i, layer in enumerate(mine)
    }
    return agreement_of(model.routing, mine, other, theirs)
