"""The cost of training for each of several devices: memory, and the shortest time of an optimizer step.

Counted from shapes, before anything is bought. P parameters of which P_t are trained, N devices, L bytes of the largest
layer's parameters in the precision of the computation (w bytes a number), R parameters outside of the layers:

    memory, ddp     4 P  (weights)  +  4 P_t  (gradients)  +  8 P_t  (AdamW)  +  w P  (copies that autocast keeps)
    memory, fsdp2   (4 P + 4 P_t + 8 P_t) / N  +  2 L + 8 R  (gathered: two layers, the rest; 4 R if frozen)
    compute         3 forward passes (2 for frozen matrices), 1 more with gradient checkpointing, over the peak
    traffic         each micro-batch reads the weights twice and adds to the gradients, 2 w P + 8 P_t; AdamW 28 P_t / N
    exchange        ddp: 2 (N-1)/N · 4 P_t once; fsdp2: (N-1)/N · (2 · gathered + 4 P_t) for each micro-batch

plus, for memory, activations and a chunk of logits (`accounting`). Compute, traffic and exchange overlap, so a step
takes the largest of the three; a real one takes longer.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from dtfcli.cost.accounting import (
    BYTES,
    LAYER,
    activation_bytes,
    forward_flops_per_token,
    nf4_savings,
    training_step_flops,
)
from dtfcli.cost.peak import matmul_peak
from dtfcli.errors import ConfigError, did_you_mean
from dtfcli.loading.devices import compute_dtype, resolve_device
from dtfcli.models.pretrained import is_added
from dtfcli.settings import Settings


@dataclass(frozen=True)
class Accelerator:
    """A device, by its maker's data sheet or as measured.

    Attributes:
        name: for people.
        flops: of dense matrix products in bfloat16 (measured ones: in the precision of the run), per second.
        memory: bytes; None: not known.
        bandwidth: of that memory, bytes per second.
        link: to the other devices, bytes per second in one direction; None: not known, and not counted.
    """

    name: str
    flops: float
    memory: float | None
    bandwidth: float
    link: float | None


ACCELERATORS = {
    "a100": Accelerator("A100 SXM 80 GB", 312e12, 80e9, 2.039e12, 300e9),
    "h100": Accelerator("H100 SXM", 989e12, 80e9, 3.35e12, 450e9),
    "h200": Accelerator("H200 SXM", 989e12, 141e9, 4.8e12, 450e9),
}
"""Dense bfloat16 peak, memory and NVLink of the data sheets."""


@dataclass(frozen=True)
class Scaling:
    """Memory and work of each of `processes` devices.

    Attributes:
        accelerator: the device that times were estimated for.
        weights, gradients, optimizer, copies, activations: bytes on each device; copies are autocast's and a
            dense parent, or gathered parameters.
        compute_seconds, traffic_seconds: of an optimizer step, at the peaks of the device.
        exchange_seconds: between devices; None: the link is not known.
    """

    processes: int
    sharding: str
    accelerator: Accelerator
    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    compute_seconds: float
    traffic_seconds: float
    exchange_seconds: float | None

    @property
    def bytes_per_device(self) -> float:
        """All of it together."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations

    @property
    def seconds_per_update(self) -> float:
        """At best: all three overlap."""
        return max(self.compute_seconds, self.traffic_seconds, self.exchange_seconds or 0.0)

    @property
    def fits(self) -> bool | None:
        """Whether a device has that much memory, with a tenth for the allocator; None: not known."""
        memory = self.accelerator.memory
        return None if memory is None else self.bytes_per_device <= 0.9 * memory


def estimate(model: Any, settings: Settings, processes: int, accelerator: Accelerator, dtype: str) -> Scaling:
    """Estimate a run.

    Args:
        model: routed or dense, on any device, meta included.
        settings: of the run, with `tokens_per_update` for these processes (`plan.for_processes`).
        processes: N.
        accelerator: of each process.
        dtype: precision of the computation: float32, bfloat16 or float16.
    """
    training, length = settings.training, settings.data.seq_len
    named, width = list(model.named_parameters()), BYTES[dtype]
    every = sum(p.numel() for _, p in named)
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    layers: dict[str, int] = {}
    for name, parameter in named:
        if match := LAYER.search(name):
            layers[match.group(1)] = layers.get(match.group(1), 0) + parameter.numel()
    outside = every - sum(layers.values())
    trained_outside = sum(p.numel() for name, p in named if p.requires_grad and not LAYER.search(name))

    sharded = training.sharding == "fsdp2"
    parts = processes if sharded else 1
    copies = float(width * every if width < 4 else 0)
    if sharded:
        copies = 2.0 * width * max(layers.values()) + 4.0 * (outside + trained_outside)
    saved = nf4_savings(model, width) if settings.lora.quantize == "nf4" else (0.0, 0.0)
    flops = training_step_flops(model, length)
    if training.gradient_checkpointing is True:  # "selective" keeps the results of products
        flops += forward_flops_per_token(model, length)
    parent = 0.0  # bytes of a dense parent to learn from
    if settings.distill.enabled:
        flops += forward_flops_per_token(model, length, dense=True)
        if not settings.shares_parent:
            parent = float(width * sum(p.numel() for name, p in named if not is_added(name)))
    tokens = settings.tokens_per_update / processes
    micro_batches = settings.accumulation_steps(processes)
    gathered = width * sum(layers.values()) + 4 * outside
    moved = micro_batches * (2 * gathered + 4 * trained) if sharded else 2 * 4 * trained
    return Scaling(
        processes=processes,
        sharding=training.sharding,
        accelerator=accelerator,
        weights=4 * every / parts - saved[0],
        gradients=4 * trained / parts,
        optimizer=8 * trained / parts,
        copies=copies - saved[1] + parent,
        activations=activation_bytes(
            model, length, training.micro_batch_size, width, checkpointing=training.gradient_checkpointing
        ),
        compute_seconds=flops * tokens / accelerator.flops,
        traffic_seconds=(micro_batches * (2 * width * every + parent + 8 * trained) + 28 * trained / parts)
        / accelerator.bandwidth,
        exchange_seconds=None if accelerator.link is None else moved * (processes - 1) / processes / accelerator.link,
    )


def find_accelerator(name: str, settings: Settings) -> Accelerator:
    """An accelerator by name; "here" is this machine's device, measured; "": the same if it is no CPU, else an H100.

    Raises:
        ConfigError: there is no such name.
    """
    device = resolve_device(settings.run.device)
    name = name or ("here" if device.type != "cpu" else "h100")
    if name == "here":
        return measured(device, compute_dtype(settings.run.dtype, device))
    if name not in ACCELERATORS:
        hint = did_you_mean(name, [*ACCELERATORS, "here"])
        raise ConfigError(f"--accelerator {name}: choose {', '.join(ACCELERATORS)} or here (measured).{hint}")
    return ACCELERATORS[name]


def measured(device: torch.device, dtype: torch.dtype) -> Accelerator:
    """The device of this machine: the rate of a large matrix product, and that of copying memory."""
    numbers = torch.ones(2**26, device=device)
    other, best = torch.empty_like(numbers), 0.0
    for _ in range(4):
        began = time.perf_counter()
        other.copy_(numbers)
        other[-1].item()  # waits for the device
        best = max(best, 2 * numbers.nbytes / (time.perf_counter() - began))
    memory = float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
    flops = matmul_peak(device, dtype) or matmul_peak(device, torch.float32)
    assert flops is not None, "every device multiplies float32"
    return Accelerator(f"this machine's {device.type}, measured", flops, memory, best, None)
