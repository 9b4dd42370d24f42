"""The bases of the mixins that stand in front of Transformers' classes: empty at run time, anything to a type checker.

A mixin such as `RoutedLayerMixin` uses attributes of the stock class behind it, which differs with the backbone.
"""

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from typing import Any as StockLM
    from typing import Any as StockLayer
    from typing import Any as StockModel
    from typing import Any as StockStack
else:
    StockModel = StockStack = StockLM = object
    StockLayer = nn.Module


def longest_text(config: Any, unlimited: int = sys.maxsize) -> int:
    """Tokens of the longest text that a model takes; `unlimited` where it has no limit (Bloom, Mamba, XLNet)."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0  # MPT's
    return limit if limit > 0 else unlimited


def global_value(config: Any, name: str, default: Any = None) -> Any:
    """A value of a stock configuration; where layers differ (Gemma 4), the one outside of its list of layers."""
    try:
        return getattr(config, name, default)
    except RuntimeError:  # by which Transformers refuses to choose
        return config.to_dict().get(name, default)


def attention_shape(config: Any) -> tuple[int, int, int]:
    """Heads, key/value heads, and the numbers of a head, E, by a stock configuration or a routed one."""
    heads = global_value(config, "num_attention_heads")
    size = global_value(config, "head_dim") or config.hidden_size // heads
    return heads, global_value(config, "num_key_value_heads") or heads, size
