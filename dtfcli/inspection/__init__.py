"""What routed models do with text: token by token, in sums over a corpus, next to another model; as page and picture.

Read in this order: `tokens` (text → tokens with their places), `text` (one text through a model), `statistics` (sums
over any number of texts), `corpus`, `comparison`; then `page` and `figure`, which draw.
"""

from dtfcli.inspection.text import LayerRouting, TextRouting, inspect_text

__all__ = ["LayerRouting", "TextRouting", "inspect_text"]
