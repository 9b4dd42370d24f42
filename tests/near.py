"""Where two ways of computing the same thing may part: a routing score that all but equals its threshold."""

import torch
from transformers import PreTrainedModel

NEAR = 1e-5


@torch.no_grad()
def near_tie(model: PreTrainedModel, input_ids: torch.Tensor) -> bool:
    """Whether any routing decision of this one row, alone and uncached, hangs on less than `NEAR`."""
    for record in model(input_ids, output_routing=True, use_cache=False).routing:
        scores = record.scores[0]
        if record.threshold is not None:
            gaps = (scores - record.threshold).abs()
        else:
            kept, left = scores[record.selected[0]], scores[~record.selected[0]]
            gaps = (kept.min() - left.max()).abs().unsqueeze(0) if len(left) else torch.ones(1)
        if gaps.min() < NEAR * max(1.0, float(scores.abs().max())):
            return True
    return False
