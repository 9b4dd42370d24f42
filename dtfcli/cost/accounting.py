"""Parameters, FLOPs and memory of a model, counted from its shapes, also on the meta device.

FLOPs of one forward pass, per token of a sequence of T tokens:

    2 · (matrix parameters the token meets)  +  4 · T · H   in each layer's attention,

H being query heads × head size; scores and weighted values cost 2 · T · H each, counted over the full T × T square as
torch's FLOP counter does. A routed layer processes K = max(1, ⌊γT⌋) of T tokens, so the matrices of its routed part
count K / T and its attention, if that is routed, (K / T)², or with keys of all tokens K / T. The language-model head
counts, embeddings (a lookup) do not; priors and routers see every token, and so do predictors while they train or
route; a forecast sees the tokens that skip, in training all of them. Routed MLPs see a share γ of the tokens, and
their forecasts the others, in training, too.
Norms, gates and other element-wise work are left out. A training step costs three forward passes where all is trained.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dtfcli.loading.quantization import NF4_BYTES, numel, projections
from dtfcli.models.configuration_fields import has_routed_mlps
from dtfcli.models.losses import CHUNK_ELEMENTS
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM
from dtfcli.models.pretrained import is_added
from dtfcli.models.stock import attention_shape

LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
"""Finds the layer in a parameter's name."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number, by precision."""


@dataclass(frozen=True)
class Account:
    """The cost of a model.

    Attributes:
        parameters: all of them; tied ones once.
        new_parameters: the ones that routing adds.
        flops_per_token: of a forward pass.
        share_of_dense: `flops_per_token` over that of the dense backbone.
        training_bytes: estimate of the peak while training.
        capacity: γ, one number or one for each routed layer; None: a dense model.
        way: how tokens are chosen, a name in `WAYS`; empty: a dense model.
    """

    parameters: int
    new_parameters: int
    trainable_parameters: int
    flops_per_token: float
    share_of_dense: float
    training_bytes: int
    capacity: float | list[float] | None
    way: str


def describe(
    model: nn.Module,
    *,
    seq_len: int,
    micro_batch_size: int,
    dtype: str,
    checkpointing: bool | str,
    parent: bool = False,
    nf4: bool = False,
) -> Account:
    """Count a model.

    Args:
        model: routed or dense, on any device.
        seq_len: T.
        micro_batch_size: rows of a forward pass in training.
        dtype: precision of the computation: float32, bfloat16 or float16.
        checkpointing: `training.gradient_checkpointing`: whether activations are recomputed.
        parent: whether a frozen copy of the backbone is kept to learn from.
        nf4: whether the projections will be held in nf4; the model still has them whole.
    """
    named = list(model.named_parameters())
    flops = forward_flops_per_token(model, seq_len)
    return Account(
        parameters=sum(p.numel() for _, p in named),
        new_parameters=sum(p.numel() for name, p in named if is_added(name)),
        trainable_parameters=sum(p.numel() for _, p in named if p.requires_grad),
        flops_per_token=flops,
        share_of_dense=flops / forward_flops_per_token(model, seq_len, dense=True),
        training_bytes=_training_bytes(model, seq_len, micro_batch_size, BYTES[dtype], checkpointing)
        + (BYTES[dtype] * sum(p.numel() for name, p in named if not is_added(name)) if parent else 0)
        - (int(sum(nf4_savings(model, BYTES[dtype]))) if nf4 else 0),
        capacity=getattr(model.config, "capacity", None),
        way=getattr(model.config, "way", ""),
    )


def nf4_savings(model: nn.Module, width: int) -> tuple[float, float]:
    """Bytes that projections in nf4 save of a model's float32 weights, and of autocast's copies.

    Args:
        model: with its projections whole.
        width: bytes of a number in the precision of the computation.
    """
    weights = sum(layer.weight.numel() for _, layer in projections(model))
    return weights * (4 - NF4_BYTES), float(weights * width if width < 4 else 0)


def forward_flops_per_token(
    model: Any,
    seq_len: int,
    *,
    dense: bool = False,
    shares: Mapping[int, float] | None = None,
    with_logits: float = 1.0,
    training: bool = False,
) -> float:
    """FLOPs of one forward pass, per token of a sequence of `seq_len`; see the module's formula.

    Args:
        model: routed or dense.
        seq_len: T.
        dense: count the backbone alone, as if every layer were dense.
        shares: measured shares of routed tokens by layer; None: by the capacity.
        with_logits: share of the tokens whose logits are computed; 1 / T when a prompt is read for its next token.
        training: the forward pass in training: predictors run and forecasts see every token.
    """
    config = model.config
    shares = {} if dense else shares or routed_shares(config, seq_len)
    attention = _attention_flops(config, seq_len)
    flops = 2.0 * config.vocab_size * config.hidden_size * with_logits
    for layer in range(config.num_hidden_layers):
        share = shares.get(layer, 1.0)
        if getattr(config, "routed_part", "block") != "mlp":
            flops += attention * share * (1.0 if getattr(config, "keeps_every_key", False) else share)
        else:
            flops += attention
    return flops + sum(each for _, each in _matrix_flops(model, shares, dense, training))


def training_step_flops(model: Any, seq_len: int, measured: Mapping[int, float] | None = None) -> float:
    """FLOPs of forward and backward, per token of a sequence of `seq_len`: three times those of the forward pass.

    The backward pass multiplies each matrix twice, for its input and, if it is trained, for its weights: frozen ones
    (LoRA's backbone) count two times. Attention's backward pass counts twice its forward one, though flash kernels
    repeat the scores (2.5 times). With `kv_tokens` "all" routed tokens' own keys and values are computed and not used:
    they have no backward pass. A forecast is computed again for the tokens whose update is known, explored ones among
    them; these pass the routed part without a backward pass.

    Args:
        model: routed or dense.
        seq_len: T.
        measured: shares of routed tokens by layer; None: by the capacity.
    """
    shares = measured or routed_shares(model.config, seq_len)
    flops = 3.0 * forward_flops_per_token(model, seq_len, shares=shares, training=True)
    matrices = _matrix_flops(model, shares, training=True)
    flops -= sum(each for parameter, each in matrices if not parameter.requires_grad)
    if not model.lm_head.weight.requires_grad:
        flops -= 2.0 * model.config.vocab_size * model.config.hidden_size
    if getattr(model.config, "keeps_every_key", False):
        for layer, share in shares.items():
            attention = model.model.layers[layer].self_attn
            for weight in (attention.k_proj.weight, attention.v_proj.weight):
                flops -= 2.0 * (1 + weight.requires_grad) * share * numel(weight)
    learns = shares and not isinstance(model, RoutedCausalLM)  # whose forecasts learn in the pass itself
    return flops + (_learning_flops(model, shares, seq_len) if learns else 0.0)


def _attention_flops(config: Any, seq_len: int) -> float:
    """Of scores and weighted values in one dense layer, per token."""
    heads, _, head_size = attention_shape(config)
    return 4.0 * seq_len * heads * head_size


def _learning_flops(model: Any, shares: Mapping[int, float], seq_len: int) -> float:
    """FLOPs of forecasts and predicted costs in training, besides the pass itself, per token of the sequence."""
    config, flops = model.config, 0.0
    explored = config.explore if config.learns_from_updates else 0.0
    flops += _attention_flops(config, seq_len) * explored * sum(1.0 - share for share in shares.values())
    for name, parameter in model.named_parameters():
        match = LAYER.search(name)
        if match is None or (layer := int(match.group(1))) not in shares or parameter.ndim < 2:
            continue
        share, more = shares[layer], (1.0 - shares[layer]) * explored
        if "forecast" in name:  # its input carries no gradient
            flops += 2.0 * 2.0 * (share + more) * parameter.numel()
        elif in_routed_part(config, name):
            for_all = "k_proj" in name or "v_proj" in name  # explored tokens see the keys of tokens that entered
            seen = float(more > 0 and not config.keeps_every_key) if for_all else 0.0
            flops += 2.0 * (more + seen) * numel(parameter)
    return flops


def in_routed_part(config: Any, name: str) -> bool:
    """Whether a parameter of a routed layer belongs to the part that only some tokens enter."""
    return not is_added(name) and (".mlp." in name or getattr(config, "routed_part", "block") != "mlp")


def _matrix_flops(
    model: Any, shares: Mapping[int, float], dense: bool = False, training: bool = False
) -> Iterator[tuple[nn.Parameter, float]]:
    """Each matrix of the layers with its FLOPs of a forward pass, per token of the sequence."""
    config = model.config
    predicts = training or getattr(config, "routing", None) == "predictor"
    for name, parameter in model.named_parameters():
        match = LAYER.search(name)
        if match is None or (dense and ".lora_" in name):
            continue
        layer = int(match.group(1))
        if is_added(name):
            # MoD's router is a matrix with one row, kept as a vector; DTF's has scalars only.
            matrix = parameter.numel() >= config.hidden_size and "norm" not in name
            if matrix and not dense and (predicts or "predictor" not in name):
                forecasts_all = training and not isinstance(model, RoutedCausalLM)
                skipping = 1.0 - shares.get(layer, 1.0) if "forecast" in name and not forecasts_all else 1.0
                yield parameter, 2.0 * met_numbers(model, name, parameter) * skipping
        elif parameter.ndim == 2:
            share = shares.get(layer, 1.0) if in_routed_part(config, name) else 1.0
            if getattr(config, "keeps_every_key", False) and layer in shares and ("k_proj" in name or "v_proj" in name):
                share += 1.0  # keys and values of all tokens, and again of the routed ones
            yield parameter, 2.0 * numel(parameter) * share
        elif parameter.ndim == 3:
            yield parameter, 2.0 * met_numbers(model, name, parameter)


def met_numbers(model: Any, name: str, parameter: nn.Parameter) -> float:
    """Numbers of a parameter that a token meets: of a forecast's several maps, or of experts, it takes a few."""
    if parameter.ndim < 3:
        return parameter.numel()
    taken = 1 if is_added(name) else getattr(model.config, "num_experts_per_tok", len(parameter))
    return parameter.numel() / len(parameter) * taken


def routed_shares(config: Any, seq_len: int) -> dict[int, float]:
    """K / T of each routed layer, and γ of each routed MLP; empty for a dense model."""
    capacities = config.layer_capacities() if hasattr(config, "layer_capacities") else {}
    if has_routed_mlps(vars(config)):
        return capacities
    return {layer: max(1, int(capacity * seq_len)) / seq_len for layer, capacity in capacities.items()}


def _training_bytes(model: Any, seq_len: int, rows: int, width: int, checkpointing: bool | str) -> int:
    """Weights, gradients and AdamW's two moments in float32, copies for autocast, and saved activations."""
    numbers = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = 4 * numbers + 12 * trainable + (width * numbers if width < 4 else 0)
    return states + activation_bytes(model, seq_len, rows, width, checkpointing=checkpointing)


def activation_bytes(model: Any, seq_len: int, rows: int, width: int, *, checkpointing: bool | str) -> int:
    """Bytes that a micro-batch keeps for its backward pass, and the loss's part.

    Activations of a block that the backward pass needs, per token: about 6 vectors of D (residual stream and norms in
    float32 count double), queries, keys, values and their output, and 4 vectors of the feed-forward width; with
    checkpointing one vector of D per layer and one whole block at a time; with "selective" also results of products
    and attention: queries, keys, values, three vectors of D and 2 of the feed-forward width. The loss holds a chunk
    of logits and the gradient of the head. An estimate: allocators and fused kernels differ.
    """
    config = model.config
    queries, keys, head_size = attention_shape(config)
    heads = head_size * (2 * queries + 2 * keys)
    block = width * (heads + 4 * config.intermediate_size) + 4 * 6 * config.hidden_size
    shares = routed_shares(config, seq_len)
    mlp_alone = getattr(config, "routed_part", "block") == "mlp"
    part = 4 * config.intermediate_size * width / block if mlp_alone else 1.0  # of the block that is routed
    layers = [1.0 - part * (1.0 - shares.get(layer, 1.0)) for layer in range(config.num_hidden_layers)]
    per_token = float(block * sum(layers))
    if checkpointing:
        per_token = 4.0 * config.hidden_size * len(layers) + block
    if checkpointing == "selective":
        per_token += width * (heads + 2 * config.hidden_size + 2 * config.intermediate_size) * sum(layers)
    logits = width * min(rows * seq_len * config.vocab_size, CHUNK_ELEMENTS)
    return int(per_token * rows * seq_len + logits + 4 * config.vocab_size * config.hidden_size)
