"""What to expect of a GPU, on paper: `python -m tools.gpu.roofline` prints the tables of docs/results/roofline.md.

A phase takes as long as the slowest of three: its FLOPs at the rate that matrix products reach, its bytes at the rate
that memory reaches, its launches at the rate of the host. FLOPs and bytes are those of `cost.accounting` and of `dtf
bench`; launches are torch's operations that compute something, counted on a small model of as many layers. A CUDA graph
launches all at once, but its kernels still start one after the other.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtfcli.bench.inference import weights_read
from dtfcli.cost.accounting import forward_flops_per_token, training_step_flops
from dtfcli.loading.build import build_comparison
from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.settings import load_settings
from tools.gpu.bench import SHAPES, TOY
from tools.gpu.summary import table

MATMUL = 0.7
"""Share of the peak that large bfloat16 products are taken to reach."""
MEMORY = 0.85
"""Share of the bandwidth that reading weights is taken to reach."""
LAUNCH = 5e-6
"""Seconds of the host for an operation of eager torch."""
GRAPHED = 1.5e-6
"""Seconds between two kernels of a CUDA graph."""
COMPILED = {"dense": 24, "routed": 30}
"""Operations of a layer in fixed shapes that `torch.compile` leaves: counted in what it made for a CPU."""
VIEWS = ["view", "reshape", "squeeze", "transpose", "slice", "expand", "detach", "aten.t.", "select.", "alias"]
VIEWS += ["permute", "split", "empty", "unbind", "as_strided", "lift"]


@dataclass(frozen=True)
class Gpu:
    """What a datasheet says.

    Attributes:
        flops: dense bfloat16 FLOP/s.
        bandwidth: bytes a second.
    """

    name: str
    flops: float
    bandwidth: float


GPUS = (Gpu("H100", 989e12, 3.35e12), Gpu("H200", 989e12, 4.8e12))


class Launches(TorchDispatchMode):
    """Counts operations that are kernels on a GPU, more or less: views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += "index_select" in name or not any(view in name for view in VIEWS)
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], Any]) -> int:
    """Of some work."""
    with Launches() as counted:
        work()
    return counted.count


class Shape:
    """A shape on the meta device, and a small model of as many layers for counting launches."""

    def __init__(self, name: str) -> None:
        settings = load_settings(SHAPES[name])
        with torch.device("meta"):
            self.models: dict[str, Any] = dict(build_comparison(settings, dtype=torch.bfloat16))
        layers = self.models["dense"].config.num_hidden_layers
        self.small: dict[str, Any] = dict(
            build_comparison(load_settings(SHAPES[name], [*TOY, f"model.scratch.num_hidden_layers={layers}"]))
        )

    def at(self, capacity: float) -> Any:
        """The routed model at γ."""
        self.models["dtf"].config.capacity = capacity
        return self.models["dtf"]

    def training_launches(self, name: str) -> int:
        """Of a step, forward and backward."""
        model, ids = self.small[name].train(), torch.ones(1, 16, dtype=torch.int64)
        model.zero_grad(set_to_none=True)  # adding to gradients that are there would count
        return launches(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())

    @torch.no_grad()
    def token_launches(self, name: str, enters: bool | None = None, fixed: bool = False) -> int:
        """Of a token decoded; `enters` says whether it enters every routed layer or none."""
        model, ids = self.small[name].eval(), torch.ones(1, 16, dtype=torch.int64)
        cache = None
        if enters is not None:
            for router in model.model.routers.values():
                router.thresholds.fill_(-torch.inf if enters else torch.inf)
            model.model.forget_checks()
            cache = RoutedCache(model.config, 32 if fixed else None)
        cache = model(ids, use_cache=True, **{CACHE_NAME: cache})[CACHE_NAME]
        model(ids[:, :1], **{CACHE_NAME: cache})
        return launches(lambda: model(ids[:, :1], **{CACHE_NAME: cache}))


def training(shapes: dict[str, Shape], gpu: Gpu, rows: int = 8, length: int = 1024) -> str:
    """Step of forward and backward."""
    lines = []
    for name, shape in shapes.items():
        dense = training_step_flops(shape.models["dense"].train(), length) * rows * length
        base = max(dense / gpu.flops / MATMUL, shape.training_launches("dense") * LAUNCH)
        lines.append([name, "dense", 1.0, dense / 1e12, shape.training_launches("dense"), 1e3 * base, None, None])
        for capacity in (0.5, 0.125):
            flops = training_step_flops(shape.at(capacity).train(), length) * rows * length
            count = shape.training_launches("dtf")
            seconds = max(flops / gpu.flops / MATMUL, count * LAUNCH)
            lines.append([name, "dtf", capacity, flops / 1e12, count, 1e3 * seconds, flops / dense, seconds / base])
    return table(["shape", "model", "γ", "TFLOP", "launches", "ms", "FLOP ratio", "time ratio"], lines)


def prefill(shapes: dict[str, Shape], gpu: Gpu, length: int) -> str:
    """A prompt of one row, logits of its last position; slots as by `slot_room`, 0.04 T and 2 √T more than γ T."""
    lines = []
    for name, shape in shapes.items():
        model, logits = shape.models["dtf"].eval(), 1 / length
        dense = forward_flops_per_token(model, length, dense=True, with_logits=logits) * length
        for capacity in (0.5, 0.125):
            shares = [min(1.0, capacity + extra) for extra in (0.0, 0.04 + 2 / math.sqrt(length))]
            flops, with_room = (
                forward_flops_per_token(
                    model, length, shares=dict.fromkeys(model.model.routed, share), with_logits=logits
                )
                * length
                for share in shares
            )
            milliseconds = [1e3 * count / gpu.flops / MATMUL for count in (dense, flops, with_room)]
            lines.append([name, capacity, *milliseconds, flops / dense, with_room / dense])
    return table(["shape", "γ", "dense ms", "dtf ms", "with free slots ms", "FLOP ratio", "with free slots"], lines)


def decode(shapes: dict[str, Shape], gpu: Gpu, length: int = 1024, capacity: float = 0.125) -> str:
    """A token at batch 1."""
    lines = []
    for name, shape in shapes.items():
        model, config = shape.at(capacity).eval(), shape.models["dense"].config
        matrices = sum(p.numel() for n, p in shape.models["dense"].named_parameters() if "embed_tokens" not in n)
        tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
        head_size = config.hidden_size // config.num_attention_heads
        stored = 4 * length * config.num_hidden_layers * config.num_key_value_heads * head_size
        weights = 2.0 * (matrices + tied)
        enters, skips = (shape.token_launches("dtf", enters) for enters in (True, False))
        fixed = shape.token_launches("dtf", True, fixed=True)
        count = shape.token_launches("dense")
        routed, layers = len(model.model.routed), config.num_hidden_layers
        compiled = [COMPILED["dense"] * (layers - routed) + COMPILED[kind] * routed for kind in ("dense", "routed")]
        ways = {
            "growing": (weights_read(model, capacity), capacity * enters + (1 - capacity) * skips, LAUNCH, count),
            "fixed": (weights_read(model, 1.0), fixed, GRAPHED, count),
            "fixed, our kernels": (weights_read(model, capacity), fixed, GRAPHED, count),
            "fixed, our kernels, compiled": (weights_read(model, capacity), compiled[1], GRAPHED, compiled[0]),
        }
        for way, (share, ours, each, dense_count) in ways.items():
            host = [each * dense_count, each * ours]
            device = [(weights * part + stored) / gpu.bandwidth / MEMORY for part in (1.0, share)]
            together = [a + b if each == GRAPHED else max(a, b) for a, b in zip(host, device, strict=True)]
            times = [1e6 * value for pair in zip(device, together, strict=True) for value in pair]
            lines.append([name, way, dense_count, round(ours), *times, together[1] / together[0]])
    header = ["shape", "decoded", "launches: dense", "dtf", "µs: dense, bytes", "dense", "dtf, bytes", "dtf"]
    return table([*header, "time ratio"], lines)


def main() -> None:
    """Print all tables."""
    shapes = {name: Shape(name) for name in SHAPES}
    parts = []
    for gpu in GPUS:
        parts += [
            f"### {gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s",
            f"Training, 8 × 1,024 tokens:\n\n{training(shapes, gpu)}",
            *(f"Prefill, a prompt of {length:,} tokens:\n\n{prefill(shapes, gpu, length)}" for length in (8192, 1024)),
            f"Decoding a token after 1,024, γ 0.125, batch 1:\n\n{decode(shapes, gpu)}",
        ]
    sys.stdout.write("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
