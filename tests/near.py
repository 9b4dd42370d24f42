"""Where two ways of computing the same thing may part: a routing score that all but equals its threshold."""

import torch
from transformers import PreTrainedModel

NEAR = 1e-5


@torch.no_grad()
def near_tie(model: PreTrainedModel, input_ids: torch.Tensor) -> bool:
    """Whether any routing decision of this one row, alone and uncached, hangs on less than `NEAR`."""
    for record in model(input_ids, output_routing=True, use_cache=False).routing:
        ranked = slice(model.config.sink_tokens, None)  # sinks enter whatever their score
        scores, selected = record.scores[0, ranked], record.selected[0, ranked]
        if record.threshold is not None:
            gaps = (scores - record.threshold).abs()
        else:
            kept, left = scores[selected], scores[~selected]
            gaps = kept.min() - left.max() if len(kept) and len(left) else torch.ones(())
        if len(scores) and gaps.min() < NEAR * max(1.0, float(scores.abs().max())):
            return True
    return False
