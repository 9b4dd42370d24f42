"""The bases of the mixins that stand in front of Transformers' classes: empty at run time, anything to a type checker.

A mixin such as `RoutedLayerMixin` uses attributes of the stock class behind it, which differs with the backbone.
"""

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


def head_size(config: Any) -> int:
    """Numbers of a head, E, by a stock configuration or a routed one."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
