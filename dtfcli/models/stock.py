"""What the mixins in front of Transformers' classes inherit, for the type checker alone; and what a stock one lacks.

A mixin stands before a stock class, as in `class RoutedLlamaLayer(RoutedLayerMixin, LlamaDecoderLayer)`, and uses
attributes of that class. They are declared here once for all backbones. At run time these bases are empty, and the
stock class alone counts.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    class StockConfig(PreTrainedConfig):
        """Configuration of a backbone."""

        num_hidden_layers: int

    class StockLayer(nn.Module):
        """A decoder layer."""

        self_attn: Any
        input_layernorm: nn.Module
        post_attention_layernorm: nn.Module
        mlp: nn.Module

        def __init__(self, config: Any, layer_idx: int) -> None: ...

    class StockModel(PreTrainedModel):
        """A stack or a language model."""

        config: Any

    class StockStack(StockModel):
        """Embeddings, layers and final norm."""

        embed_tokens: nn.Embedding
        layers: nn.ModuleList
        norm: nn.Module
        rotary_emb: nn.Module

    class StockLM(StockModel):
        """A stack with its language-model head."""

        model: Any
        lm_head: nn.Linear

else:
    StockConfig = StockModel = StockStack = StockLM = object
    StockLayer = nn.Module


def head_size(config: Any) -> int:
    """Numbers of a head, E, by a stock configuration or a routed one."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
