"""Draw docs/images/topk-leak.svg: a growing text, and which of its tokens a routed layer takes under each rule.

    python -m tools.leak_picture MODEL [LAYER]

MODEL is a trained routed model, such as a quickstart run.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from dtfcli.loading.load import load_model, load_tokenizer

TEXT = """def mean(values):
    total = sum(values)
    if not values:
        raise ValueError('no values')
    return total"""
PASSED, ROUTED, FLIPPED = "#d9dbe1", "#3b5bdb", "#e8590c"
TITLES = {
    "topk": "top-K: the past changes when the text grows",
    "threshold": "threshold: what was decided stays decided",
}


@torch.inference_mode()
def decisions(model: Any, input_ids: torch.Tensor, mode: str, layer: int) -> np.ndarray:
    """0 passed by, 1 routed, 2 decided otherwise than when the text was one token shorter; NaN: not there yet."""
    length = input_ids.shape[1]
    grid = np.full((length, length), np.nan)
    before: list[bool] = []
    with model.routing_mode(mode):
        for end in range(1, length + 1):
            records = model(input_ids[:, :end], use_cache=False, output_routing=True).routing
            record = next(record for record in records if record.layer == layer)
            now = record.selected[0].tolist()
            grid[end - 1, :end] = now
            for t, (old, new) in enumerate(zip(before, now, strict=False)):
                if old != new:
                    grid[end - 1, t] = 2
            before = now
    return grid


def main(path: str, layer: int | None = None) -> None:
    """Draw the picture."""
    model: Any = load_model(path)
    tokenizer = load_tokenizer(path)
    input_ids = torch.tensor([tokenizer(TEXT)["input_ids"][:44]])
    layer = model.routed_layers[len(model.routed_layers) // 2] if layer is None else layer
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.9), sharey=True, layout="constrained")
    for axis, mode in zip(axes, TITLES, strict=True):
        grid = decisions(model, input_ids, mode, layer)
        flips = int((grid == 2).sum())
        axis.imshow(grid, cmap=ListedColormap([PASSED, ROUTED, FLIPPED]), vmin=0, vmax=2, interpolation="nearest")
        axis.set_title(f"{TITLES[mode]}\n{flips} decisions taken back", fontsize=10, loc="left")
        axis.set_xlabel("token")
        axis.spines[["top", "right"]].set_visible(False)
        print(f"{mode}: {flips} decisions taken back")  # noqa: T201
    axes[0].set_ylabel("tokens of the text so far")
    names = {"passes by": PASSED, "enters the layer": ROUTED, "decided otherwise one token earlier": FLIPPED}
    handles = [Patch(color=color, label=name) for name, color in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    target = Path(__file__).parents[1] / "docs" / "images" / "topk-leak.svg"
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
