"""`dtf bench` for the shapes of Qwen2.5 with random weights, case by case, the important and quick ones first.

Weights in bfloat16 stay on the device from case to case; a 7B model is drawn there, not on the host. A case is left out
when the time that is left is not expected to be enough for it, and given up when it was not.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dtfcli.bench.report import BenchOptions
from dtfcli.bench.run import bench
from dtfcli.loading.build import build_comparison
from dtfcli.settings import Settings, load_settings
from tools.gpu.job import Job, OutOfTime

SHAPES = {"0.5B": "dtf-qwen2.5-0.5b", "1.5B": "dtf-qwen2.5-1.5b", "7B": "dtf-qwen2.5-7b"}
"""Shape → the preset that has it; their bases are known without the Hub (`loading.base_configs`)."""

TOY = [
    *("model.base=", "model.scratch.family=qwen2", "model.scratch.hidden_size=64", "model.scratch.vocab_size=512"),
    *("model.scratch.intermediate_size=128", "model.scratch.num_hidden_layers=6"),
    *("model.scratch.num_attention_heads=4", "model.scratch.num_key_value_heads=2"),
    *("model.scratch.max_position_embeddings=512", "data.seq_len=64"),
]
"""Overrides that make any of the shapes small enough to rehearse with."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        shape: of `SHAPES`.
        phase: train, prefill or decode.
        batch, seq_len: rows, and tokens of each or of its prompt.
        seconds: guessed for an H200; what the first cases really take corrects the guesses for the others.
        repeats: rounds of training steps or prefill passes.
        how: switches of `BenchOptions`, with spaces: fixed, triton, compiled. Compiled ones last: compiling takes long.
    """

    shape: str
    phase: str
    batch: int
    seq_len: int
    seconds: float
    repeats: int = 7
    how: str = ""

    @property
    def name(self) -> str:
        return f"{self.shape} {self.phase} {self.batch}x{self.seq_len} {self.how}".strip()


CASES = [
    Case("0.5B", "train", 8, 1024, 25),
    Case("0.5B", "prefill", 1, 8192, 10),
    Case("0.5B", "decode", 1, 1024, 20),
    Case("7B", "decode", 1, 1024, 35),
    Case("7B", "decode", 1, 1024, 20, how="fixed triton"),
    Case("0.5B", "decode", 1, 1024, 12, how="fixed triton"),
    Case("7B", "decode", 1, 1024, 20, how="fixed"),
    Case("1.5B", "train", 8, 1024, 30),
    Case("7B", "prefill", 1, 8192, 25, repeats=3),
    Case("7B", "decode", 1, 1024, 60, how="fixed triton compiled"),
    Case("0.5B", "decode", 16, 1024, 20),
    Case("7B", "decode", 16, 1024, 25),
    Case("0.5B", "decode", 1, 1024, 50, how="fixed triton compiled"),
    Case("1.5B", "prefill", 1, 8192, 12),
    Case("0.5B", "train", 8, 1024, 20, how="triton"),
    Case("1.5B", "decode", 1, 1024, 22),
    Case("0.5B", "prefill", 1, 1024, 6),
    Case("0.5B", "prefill", 16, 1024, 10),
    Case("0.5B", "decode", 1, 8192, 22),
    Case("7B", "decode", 1, 8192, 28),
    Case("7B", "prefill", 1, 1024, 10),
    Case("0.5B", "train", 1, 8192, 25),
    Case("1.5B", "prefill", 1, 1024, 7),
    Case("1.5B", "decode", 16, 1024, 24),
    Case("0.5B", "prefill", 16, 8192, 30, repeats=3),
    Case("7B", "prefill", 16, 1024, 40, repeats=3),
    Case("0.5B", "decode", 16, 8192, 30),
    Case("1.5B", "train", 1, 8192, 30),
    Case("1.5B", "prefill", 16, 1024, 15, repeats=3),
    Case("1.5B", "decode", 1, 8192, 24),
]
TOY_CASES = [
    Case("0.5B", "train", 2, 64, 5, repeats=2),
    Case("0.5B", "prefill", 1, 128, 2, repeats=2),
    Case("7B", "decode", 2, 32, 5),
    Case("0.5B", "decode", 1, 32, 5, how="fixed"),
]


def run(job: Job) -> None:
    """Measure the cases in order, as far as the time goes."""
    models = Models(job.device(), job.rehearse)
    device_name = torch.cuda.get_device_name() if models.device.type == "cuda" else "cpu"
    job.write(device_name=device_name)
    run_cases(job, TOY_CASES if job.rehearse else CASES, lambda case: measure(case, models, job))


def run_cases(job: Job, cases: Sequence[Case], work: Callable[[Case], dict[str, Any]]) -> None:
    """Do the work of each case that still fits; write after each what is known.

    A case that fails is noted and costs the others nothing but its time.
    """
    done: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    job.write(cases=done, skipped=skipped)
    expected = taken = 0.0
    for case in cases:
        slowness = max(0.5, taken / expected) if expected else 1.0
        if case.seconds * slowness > job.left():
            reason = f"about {case.seconds * slowness:.0f} s, {max(0.0, job.left()):.0f} s were left"
            skipped.append({"name": case.name, "why": reason})
            job.write()
            continue
        left = job.left()
        try:
            result = work(case)
        except OutOfTime as error:
            skipped.append({"name": case.name, "why": str(error)})
        except Exception:
            job.failed(case.name)
        else:
            took = left - job.left()
            done.append({"name": case.name, **asdict(case), "took": round(took, 2), "report": result})
            expected, taken = expected + case.seconds, taken + took
        job.write()


def measure(case: Case, models: "Models", job: Job) -> dict[str, Any]:
    """The report of one case, as plain values."""
    chosen: dict[str, Any] = dict.fromkeys(case.how.split(), True)
    options = BenchOptions(
        capacities=[0.125, 0.5],
        phases=[case.phase],
        dtype=torch.bfloat16,
        seq_len=case.seq_len,
        batch=case.batch,
        new_tokens=4 if job.rehearse else 32,
        repeats=case.repeats,
        calibration_tokens=256 if job.rehearse else max(4096, case.seq_len),
        **chosen,
    )
    try:
        return asdict(bench(lambda dtype: models.get(case.shape, dtype), options, job.check))
    finally:
        models.give_back()


class Models:
    """Builds the models of a shape on the device; those of inference are kept."""

    def __init__(self, device: torch.device, toy: bool) -> None:
        self.device = device
        self._toy = toy
        self._kept: dict[str, dict[str, Any]] = {}

    def settings(self, shape: str) -> Settings:
        """The preset of a shape."""
        return load_settings(SHAPES[shape], TOY if self._toy else [])

    def get(self, shape: str, dtype: torch.dtype) -> dict[str, Any]:
        """The models by name, "dense" among them, sharing weights of this dtype."""
        if dtype == torch.float32:
            return self._build(shape, dtype)
        if shape not in self._kept:
            self._kept[shape] = self._build(shape, dtype)
        return dict(self._kept[shape])

    def _build(self, shape: str, dtype: torch.dtype) -> dict[str, Any]:
        with self.device:  # drawing 7B numbers on the host would take minutes
            models = build_comparison(self.settings(shape), dtype=dtype)
        return {name: model.to(self.device) for name, model in models.items()}  # type: ignore[arg-type]

    def give_back(self) -> None:
        """Free what a case left on the device, as far as nothing holds it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
