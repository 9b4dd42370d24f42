"""Options and results of a measurement."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        capacities: γ to measure at.
        phases: any of "train", "prefill" and "decode".
        dtype: of the weights in inference, of the autocast in training (float32: none).
        seq_len: tokens of a row, or of the prompt.
        new_tokens: tokens decoded one by one after the prompt.
        repeats: training steps and prefill passes of each model, in turns, after one of warm-up.
        calibration_tokens: random tokens on which thresholds are measured.
        stock: also measure the dense model as Transformers trains it.
        compiled: compile layers, as `training.compile` does; in decoding only with a static cache.
        kernels: of norms and SwiGLU, as `training.kernels`; also those of "stock".
        static: decode with a static cache, on a GPU by a CUDA graph; dense, too.
        triton: with our kernel: a static cache reads no weights of a layer that no row enters.
    """

    capacities: Sequence[float]
    phases: Sequence[str] = ("train", "prefill", "decode")
    dtype: torch.dtype = torch.float32
    seq_len: int = 512
    batch: int = 1
    new_tokens: int = 64
    repeats: int = 7
    calibration_tokens: int = 4096
    stock: bool = False
    compiled: bool = False
    kernels: str = "torch"
    static: bool = False
    triton: bool = False

    @property
    def inference_phases(self) -> list[str]:
        """The phases other than training."""
        return [phase for phase in self.phases if phase != "train"]

    def random_ids(self, vocab_size: int, length: int) -> torch.Tensor:
        """Token ids, int64 [batch, length], the same each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocab_size, (self.batch, length), generator=generator)


@dataclass(frozen=True)
class StepResult:
    """A training step of one model, next to dense.

    Attributes:
        architecture: "dense", "stock", "dtf" or "mod".
        forward_ms, backward_ms, step_ms: medians; step_ms is both together, without the optimizer.
        optimizer_ms: of an AdamW step over all parameters.
        time_ratio: median of this model's step over dense's, over the rounds.
        cpu_ratio: the same in processor time; None on other devices.
        flop_ratio: FLOPs over those of dense.
        peak_bytes: most memory held during a step, weights included; None where the system does not say.
        tokens_per_second: in steps without the optimizer.
        utilization: FLOP/s over the measured peak of a matrix product; None if that cannot be measured.
    """

    architecture: str
    capacity: float
    forward_ms: float
    backward_ms: float
    step_ms: float
    optimizer_ms: float
    time_ratio: float
    cpu_ratio: float | None
    flop_ratio: float
    peak_bytes: int | None
    tokens_per_second: float
    utilization: float | None


@dataclass(frozen=True)
class PhaseResult:
    """One model in one phase, next to dense.

    Attributes:
        routed_share: share of tokens that entered a routed layer, over the tokens timed and all routed layers.
        dense_ms, routed_ms: medians, per forward pass (prefill) or token (decode).
        time_ratio: median of routed / dense over the pairs.
        theory: the ratio of the computation alone at the realized shares: of FLOPs (prefill), or of the weights that
            are read for a token (decode).
        cache_ratio: bytes of the cache after the phase over those of dense.
        cache_bytes, tokens_per_second: of the routed model.
    """

    phase: str
    architecture: str
    capacity: float
    routed_share: float
    dense_ms: float
    routed_ms: float
    time_ratio: float
    theory: float
    cache_ratio: float
    cache_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """All results, and the machine and options of the measurement."""

    device: str
    dtype: str
    threads: int
    torch: str
    batch: int
    seq_len: int
    new_tokens: int
    static: bool
    triton: bool
    matmul_gflops: float
    results: list[PhaseResult]
    training: list[StepResult]
