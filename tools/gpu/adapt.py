"""SmolLM2-135M adapted on novels, dtf and then dense for as many updates, in the time that is left.

A short run first says how long an update takes and how long all that is not an update. Without the packed model and
text, models of the same recipe start from random weights on generated text: still a measure of speed.
"""

import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtfcli.experiment import train as train_model
from dtfcli.settings import load_settings
from tools.gpu.job import Job
from tools.gpu.pack import MODEL, TEXT

COMMON = {
    "training.log_every": 1,
    "training.checkpoint_every": 100000,  # a checkpoint of 1.6 GB takes as long as dozens of updates
    "data.validation_fraction": 0.05,
    "logging.live": "false",
}
SIZES = {"data.seq_len": 1024, "training.micro_batch_size": 32, "training.tokens_per_update": 32768}
TOY_SIZES = {
    "data.seq_len": 64,
    "data.validation_blocks": 4,
    "training.micro_batch_size": 4,
    "training.tokens_per_update": 256,
}
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SHAPE |= {"num_key_value_heads": 3, "vocab_size": 8192, "max_position_embeddings": 1024}
TOY_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
TOY_SHAPE |= {"num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 64}
ROUTED = {"model.score": "forecast_error", "model.bypass": "forecast", "model.kv_tokens": "all"}
"""What the preset for the packed model says of routing, for models from scratch."""
TOY_ROUTED = {"training.calibration_tokens": 256}
TIMED_STEPS = 12
MOST_STEPS = 2000
SAFETY = 1.2
"""An update of a long run beside one of the short run."""


@dataclass
class Watch:
    """Listens to a run: when its updates ended, and what was measured."""

    job: Job
    tokens_per_update: int
    curve: list[dict[str, Any]] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    parameters: float | None = None

    def __call__(self, event: Any) -> None:
        """Note an event.

        Raises:
            OutOfTime: the stage's time is over.
        """
        values = event.metrics
        if event.kind == "start":
            self.parameters = values.get("parameters")
        if event.kind == "step":
            self.job.check()
            self.ended.append(time.monotonic())
        if event.kind in ("step", "evaluation"):
            names = ("train/loss", "tokens_per_second", "mfu", "val/loss", "val/loss_topk", "val/routed_share")
            line = {name: values[name] for name in names if values.get(name) is not None}
            self.curve.append({"step": event.step, "tokens": event.step * self.tokens_per_update} | line)
            if len(self.curve) % 20 == 0:
                self.job.write()

    def step_seconds(self) -> float:
        """Median of the later half of the updates: the first ones warm up."""
        gaps = [after - before for before, after in zip(self.ended, self.ended[1:], strict=False)]
        return statistics.median(gaps[len(gaps) // 2 :])


def run(job: Job) -> None:
    """Time a short run, then train both."""
    with tempfile.TemporaryDirectory() as folder:
        values = choose_settings(job, Path(folder))
        timed: list[dict[str, Any]] = []
        runs: list[dict[str, Any]] = []
        job.write(settings=values, packed=bool(values["model.base"]), timed=timed, runs=runs)
        short = train(job, "dtf", values, 3 if job.rehearse else TIMED_STEPS, timed)
        other = short["seconds"] - short["step_seconds"] * short["steps"]
        steps = 4 if job.rehearse else plan_steps(job.left(), short["step_seconds"], other)
        job.write(planned_steps=steps)
        if steps < TIMED_STEPS and not job.rehearse:
            job.write(stopped=f"{job.left():.0f} s were left: too few for a run of {TIMED_STEPS} updates")
            return
        for architecture in ("dtf", "dense"):
            train(job, architecture, values, steps, runs)


def plan_steps(left: float, step: float, other: float) -> int:
    """Updates of two runs in a time.

    Args:
        left: seconds for both.
        step: seconds of an update.
        other: seconds that a run takes besides.
    """
    return max(0, min(MOST_STEPS, int((0.9 * left - 2 * other) / (2 * SAFETY * step))))


def train(
    job: Job, architecture: str, values: dict[str, Any], steps: int, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """One run; its record is added to `runs` and filled in as it goes."""
    base = values["model.base"]
    own: dict[str, Any] = {
        "run.name": f"{architecture}-{steps}",
        "training.max_steps": steps,
        "training.eval_every": max(1, steps // 4),
    }
    if architecture != "dense":
        own |= ({} if base else ROUTED) | (TOY_ROUTED if job.rehearse else {})
        own |= {"training.fit_tokens": 1024} if job.rehearse and base else {}
    overrides = [f"{key}={value}" for key, value in (values | own).items()]
    watch = Watch(job, values["training.tokens_per_update"])
    record: dict[str, Any] = {"architecture": architecture, "steps": steps, "curve": watch.curve}
    runs.append(record)
    settings = load_settings("dtf-smollm2-135m" if base else "quickstart", [f"model={architecture}", *overrides])
    began = time.monotonic()
    result = train_model(settings, rename=True, on_event=watch)
    logged = [line for line in watch.curve if "tokens_per_second" in line]
    later = logged[len(logged) // 2 :]
    utilizations = [line["mfu"] for line in later if "mfu" in line]
    record |= {
        "seconds": time.monotonic() - began,
        "parameters": watch.parameters,
        "tokens": steps * values["training.tokens_per_update"],
        "step_seconds": watch.step_seconds(),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in later),
        "mfu": statistics.median(utilizations) if utilizations else None,
        "final": result.metrics,
    }
    job.write()
    return record


def choose_settings(job: Job, folder: Path) -> dict[str, Any]:
    """Overrides for the packed model and text, or for random weights and generated text."""
    job.device()
    model, text = job.data / MODEL, job.data / TEXT
    sizes = TOY_SIZES if job.rehearse else SIZES
    values: dict[str, Any] = COMMON | sizes | {"run.output_dir": folder / "runs", "data.cache_dir": folder / "tokens"}
    values["run.device"] = "cpu" if job.rehearse else "cuda"
    if not (model.is_file() and text.is_file()):
        text = folder / TEXT
        write_generated(text, 60_000 if job.rehearse else 6_000_000)
        shape = TOY_SHAPE if job.rehearse else SHAPE
        values |= {"model.base": ""} | {f"model.scratch.{name}": size for name, size in shape.items()}
    else:
        values["model.base"] = model.resolve()
    values["data.sources"] = f'[{{path = "{text.resolve()}"}}]'
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def write_generated(file: Path, characters: int) -> None:
    """Documents of made-up words, the frequent ones short and far more frequent, as language has it."""
    chance = random.Random(0)
    words = ["".join(chance.choices("aeiounrstlm", k=2 + rank // 200)) for rank in range(1200)]
    weights = [1 / (1 + rank) for rank in range(len(words))]
    with file.open("w", encoding="utf-8") as lines:
        while lines.tell() < characters:
            document = " ".join(chance.choices(words, weights, k=300))
            lines.write(json.dumps({"text": document}) + "\n")
