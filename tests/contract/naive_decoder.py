"""A routed model, decoded by a loop over tokens and layers: no batches, no tensors of tokens, no cache class.

Each token walks up the stack alone. A layer's memory is a list of (key, value) pairs; a routed layer appends to it
when the token enters. What the fast path must reproduce.
"""

import math

import torch
from torch import Tensor

from dtfcli.models import routing_naive


def rms_norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    return x / torch.sqrt((x * x).mean() + module.variance_epsilon) * module.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = len(x) // 2
    return x * cos + torch.cat([-x[half:], x[:half]]) * sin


class Layer:
    """One decoder layer and what it remembers."""

    def __init__(self, layer, config) -> None:
        self.layer, self.config = layer, config
        self.memory: list[tuple[Tensor, Tensor]] = []

    def remember(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        attention = self.layer.self_attn
        normed = rms_norm(x, self.layer.input_layernorm)
        key = attention.k_proj(normed).view(-1, attention.head_dim)
        value = attention.v_proj(normed).view(-1, attention.head_dim)
        self.memory.append((torch.stack([rotate(head, cos, sin) for head in key]), value))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = self.layer.self_attn
        queries = attention.q_proj(rms_norm(x, self.layer.input_layernorm)).view(-1, attention.head_dim)
        heads = []
        for h, query in enumerate(queries):
            shared = h // attention.num_key_value_groups
            query = rotate(query, cos, sin)
            weights = [query @ key[shared] / math.sqrt(attention.head_dim) for key, _ in self.memory]
            shares = torch.softmax(torch.stack(weights), 0)
            heads.append(sum(share * value[shared] for share, (_, value) in zip(shares, self.memory, strict=True)))
        return x + attention.o_proj(torch.cat(heads))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.layer.mlp(rms_norm(x, self.layer.post_attention_layernorm))

    def block(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.feed(self.attend(x, cos, sin))

    def skip(self, x: Tensor) -> Tensor:
        """What a token is that does not enter."""
        if self.config.bypass == "identity":
            return x
        forecast = self.layer.forecast_prior
        n = x / torch.sqrt((x * x).mean() + forecast.eps)
        guess = forecast.linear.weight @ n
        if forecast.network is not None:
            gate, up = forecast.network.w_in(n).chunk(2)
            guess = guess + forecast.network.w_out(gate * torch.sigmoid(gate) * up)
        return x + guess


def score_of(x: Tensor, router, config, below, surprises: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Score and gate of one token; `surprises` grows."""
    one = torch.ones(())
    if config.architecture == "layerdrop":
        return one, one
    if config.architecture in ("mod", "random"):
        return x @ router.weight, torch.sigmoid(x @ router.weight)
    if config.score != "surprise":
        return routing_naive.cost_score(x, router.weight, router.w_in, router.w_out, router.eps), one
    static, change = below
    surprises.append(static)
    average = routing_naive.moving_average(surprises, config.ma_window, config.sink_tokens)[-1]
    if config.surprise_scale == "running":
        unit = (average if average > 0 else static).clamp(min=1e-6)
        static, change, average = static / unit, change / unit, average / unit
    scalars = (router.log_o_ce.exp(), router.log_m_cu.exp(), router.beta_ce, router.beta_cu)
    gate, score = routing_naive.dtf_gate(static, change, average, *scalars)
    return score, gate


@torch.no_grad()
def decode(model, input_ids: list[int]) -> Tensor:
    """Logits [T, V] of one row, in `threshold` mode at the model's capacity."""
    stack, config = model.model, model.config
    layers = [Layer(layer, config) for layer in stack.layers]
    surprises: dict[int, list[Tensor]] = {index: [] for index in stack.routers}
    logits = []
    for t, token in enumerate(input_ids):
        x = stack.embed_tokens.weight[token]
        cos, sin = (part[0, 0] for part in stack.rotary_emb(x[None, None], torch.tensor([[t]])))
        below: tuple[Tensor, Tensor] | None = None
        for index, walker in enumerate(layers):
            router = stack.routers.get(index)
            if router is None:
                original = x
                walker.remember(x, cos, sin)
                x = walker.block(x, cos, sin)
                if hasattr(walker.layer, "prior"):
                    below = routing_naive.surprise(original, x, original + walker.layer.prior(original))
                continue
            if config.routed_part == "mlp":
                walker.remember(x, cos, sin)
                x = walker.attend(x, cos, sin)
            score, gate = score_of(x, router, config, below, surprises[index])
            threshold = float(router.threshold("threshold", stack.capacity_override))
            if config.architecture == "layerdrop":
                entered = bool(config.layer_capacities(stack.capacity_override)[index])
            else:
                entered = t < config.sink_tokens or bool(score > threshold)
            every_key = config.kv_tokens == "all" and config.architecture != "layerdrop"
            if config.routed_part != "mlp" and (entered or every_key):
                walker.remember(x, cos, sin)
            skipped = walker.skip(x)
            if entered:
                process = {"block": walker.block, "attention": walker.attend, "mlp": lambda x, *_, w=walker: w.feed(x)}
                update = process[config.routed_part](x, cos, sin) - skipped
                x = skipped + (1.0 if config.gate == "straight_through" else gate.float()) * update
            else:
                x = skipped
            if config.routed_part == "attention":
                x = walker.feed(x)
        logits.append(model.lm_head(rms_norm(x, stack.norm)))
    return torch.stack(logits)
