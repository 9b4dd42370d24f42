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

    def block(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = self.layer.self_attn
        queries = attention.q_proj(rms_norm(x, self.layer.input_layernorm)).view(-1, attention.head_dim)
        heads = []
        for h, query in enumerate(queries):
            shared = h // attention.num_key_value_groups
            query = rotate(query, cos, sin)
            weights = [query @ key[shared] / math.sqrt(attention.head_dim) for key, _ in self.memory]
            shares = torch.softmax(torch.stack(weights), 0)
            heads.append(sum(share * value[shared] for share, (_, value) in zip(shares, self.memory, strict=True)))
        x = x + attention.o_proj(torch.cat(heads))
        return x + self.layer.mlp(rms_norm(x, self.layer.post_attention_layernorm))


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
            capacity = config.layer_capacities(stack.capacity_override)[index]
            if config.architecture == "layerdrop":
                if capacity:
                    walker.remember(x, cos, sin)
                    x = walker.block(x, cos, sin)
                continue
            if config.architecture in ("mod", "random"):
                score = x @ router.weight
                gate = torch.sigmoid(score)
            else:
                assert below is not None
                static, change = below
                surprises[index].append(static)
                average = routing_naive.moving_average(surprises[index], config.ma_window, config.sink_tokens)[-1]
                scalars = (router.log_o_ce.exp(), router.log_m_cu.exp(), router.beta_ce, router.beta_cu)
                gate, score = routing_naive.dtf_gate(static, change, average, *scalars)
            entered = t < config.sink_tokens or bool(score > router.threshold("threshold", stack.capacity_override))
            if entered or config.kv_tokens == "all":
                walker.remember(x, cos, sin)
            if entered:
                update = walker.block(x, cos, sin) - x
                x = x + (1.0 if config.gate == "straight_through" else gate.float()) * update
        logits.append(model.lm_head(rms_norm(x, stack.norm)))
    return torch.stack(logits)
