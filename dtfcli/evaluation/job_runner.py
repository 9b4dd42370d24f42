"""Runs the jobs of one model, one after the other, and collects their results.

All data is loaded before anything is computed. Answers of an earlier run that was stopped are reused.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.metrics import mean

from dtfcli.errors import ConfigError, DataError, DTFError
from dtfcli.evaluation.answers import AnswerStore, fingerprint
from dtfcli.evaluation.harness import SEED, LoadedJob, load_job, score
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.evaluation.local_data import evaluated_split, fewshot_split
from dtfcli.evaluation.plan import EvalPlan
from dtfcli.evaluation.report import Items, TaskScore, is_causal, model_hash, run_folder_of, shares_of
from dtfcli.evaluation.suites import VALIDATION_TEXT, Job
from dtfcli.evaluation.validation_text import HeldOut, held_out_rows, score_rows
from dtfcli.loading.quantization import quantization_of
from dtfcli.loading.source import ModelSource
from dtfcli.shares import ShareMeter, measured_shares

_PACKAGES = ("dtfcli", "lm_eval", "torch", "transformers", "datasets")


@dataclass(frozen=True)
class EvalEvent:
    """Progress of an evaluation.

    Attributes:
        kind: "model" (a model is loaded next), "phase", "job" (a job begins), "answers" (requests were answered),
            "done" (a job ends), or "warning".
        message: the text, or the name of the model or job.
        scores: by task, when a job ends.
    """

    kind: Literal["model", "phase", "job", "answers", "done", "warning"]
    message: str = ""
    count: int = 0
    scores: dict[str, TaskScore] | None = None


EvalListener = Callable[[EvalEvent], None]


class JobRunner:
    """The jobs of one model, and their results.

    Attributes:
        hash: sha256 over the model's weights.
        meter: routed shares over all jobs.
        skipped: optional jobs without data, with the reason.
        reused: requests answered by an earlier run.
    """

    def __init__(
        self, plan: EvalPlan, lm: RoutedLM, source: ModelSource | None, state: Path | None, emit: EvalListener
    ) -> None:
        """Take a model from `source` (None: made in memory); its answers are kept in `state` (None: nowhere)."""
        self.plan, self.lm, self.source, self.state, self.emit = plan, lm, source, state, emit
        self.hash = model_hash(lm.model, source)
        self.meter = ShareMeter()
        self.results: dict[str, TaskScore] = {}
        self.items: dict[str, Items] = {}
        self.skipped: dict[str, str] = {}
        self.reused = 0

    def load(self) -> list[LoadedJob | HeldOut]:
        """Load the data of all jobs.

        Raises:
            ConfigError: a task file is wrong, or the routing mode cannot run a task.
            DataError: a dataset is not available.
        """
        leaves = (leaf for job in self.plan.jobs for leaf in self.plan.index.leaves(job.name))
        self._check_can_write({name: config.get("output_type", "") for name, config in leaves})
        jobs: list[LoadedJob | HeldOut] = []
        for job in self.plan.jobs:
            self.emit(EvalEvent("phase", f"Loading {job.name}"))
            try:
                jobs.append(self._held_out() if job.name == VALIDATION_TEXT else self._load(job))
            except DataError as error:
                if not job.optional:
                    raise
                self.skipped[job.name] = str(error)
                self.emit(EvalEvent("warning", f"left out: {error}"))
        return jobs

    def _check_can_write(self, output_types: Mapping[str, str]) -> None:
        """Refuse tasks in which the model writes if its routing needs the whole text."""
        writes = [name for name, output_type in output_types.items() if output_type == "generate_until"]
        if writes and not is_causal(self.lm.routing):
            more = " and others" if len(writes) > 3 else ""
            raise ConfigError(
                f"--tasks {', '.join(writes[:3])}{more}: the model writes here, but --routing {self.lm.routing} needs "
                "the whole text. Leave these tasks out, or use --routing threshold."
            )

    def _load(self, job: Job) -> LoadedJob:
        loaded = load_job(job, self.plan.index, self.plan.data_dir)
        tasks = loaded.tasks
        # Again, because the file of a task that is written in Python does not say it.
        self._check_can_write({name: task.OUTPUT_TYPE for name, task in tasks.items()})
        for name, origin in loaded.origins.items():
            if origin.scored_instead or (origin.missing_splits and tasks[name].get_config("num_fewshot")):
                self.emit(EvalEvent("warning", _missing(name, origin.missing_splits, tasks[name])))
        shots = self.plan.options.num_fewshot
        if fixed := [n for n, task in tasks.items() if shots not in (None, task.get_config("num_fewshot"))]:
            self.emit(EvalEvent("warning", f"{', '.join(fixed)}: takes no examples; --num-fewshot does not apply."))
        return loaded

    def _held_out(self) -> HeldOut:
        source = self.source
        run = run_folder_of(Path(source.path)) if source is not None and source.kind == "folder" else None
        return held_out_rows(run, self.lm.tokenizer, self.plan.options.limit)

    def run(self, job: LoadedJob | HeldOut) -> list[AnswerStore]:
        """Run a loaded job; returns the stores of its answers."""
        if isinstance(job, HeldOut):
            self._run_held_out(job)
            return []
        name = job.job.name
        store = AnswerStore(self._state_file(job))
        self.emit(EvalEvent("job", name, job.requests()))
        try:
            results, items = score(job, self.lm, store, self.plan.options.confirm_run_unsafe_code)
        except OSError as error:
            raise DTFError(f"{store.path}: answers cannot be kept ({error.strerror or error}).") from error
        finally:
            store.close()
        self.results |= results
        self.items |= items
        self.reused += store.reused
        self.meter.add_counts(self.lm.meter.counts())
        self.emit(EvalEvent("done", name, scores=results))
        return [store]

    def _state_file(self, job: LoadedJob) -> Path | None:
        """The file of a job's answers, named after everything that they depend on."""
        if self.state is None:
            return None
        lm = self.lm
        circumstances = {
            "weights": self.hash,
            "routing": lm.routing,
            "capacity": getattr(lm.model, "capacity", None),
            "tasks": job.configuration(),
            "limit": job.job.limit,
            "seed": SEED,
            "rows": self.plan.rows,
            "device": lm.device.type,
            "dtype": str(lm.model.dtype),
            "attention": lm.model.config._attn_implementation,
            "positions": lm.max_length,
            "versions": versions(),
        }
        if (quantized := quantization_of(lm.model)) is not None:
            circumstances |= {"quantize": quantized.kind, "torchao": importlib.metadata.version("torchao")}
        return self.state / f"{job.job.name}-{fingerprint(circumstances)}.jsonl"

    def _run_held_out(self, text: HeldOut) -> None:
        lm, clock = self.lm, time.perf_counter()
        self.emit(EvalEvent("job", VALIDATION_TEXT, len(text.rows)))
        with measured_shares(lm.model) as meter:
            metrics, losses = score_rows(lm.model, text, lm.on_answers)
        self.meter.add_counts(meter.counts())
        result = TaskScore(
            metrics=metrics,
            n=len(text.rows),
            shots=0,
            split="validation",
            dataset="the run's own text",
            data_source="run",
            routing=lm.routing,
            causal=is_causal(lm.routing),
            routed_share=shares_of(meter),
            truncated=0,
            seconds=round(time.perf_counter() - clock, 3),
        )
        mean_loss = metrics["loss"].value
        values = {name: [loss * metric.value / mean_loss for loss in losses] for name, metric in metrics.items()}
        hashes = tuple(fingerprint(row.tolist()) for row in text.rows)
        self.results[VALIDATION_TEXT] = result
        self.items[VALIDATION_TEXT] = Items(hashes, values, dict.fromkeys(values, mean))
        self.emit(EvalEvent("done", VALIDATION_TEXT, scores={VALIDATION_TEXT: result}))


def _missing(name: str, splits: Sequence[str], task: Any) -> str:
    text = f"{name}: the data has no split {' or '.join(splits)}; scored on {evaluated_split(task)}"
    if task.get_config("num_fewshot"):
        text += f", examples from {fewshot_split(task)}"
        text += ", the item itself left out" if fewshot_split(task) == evaluated_split(task) else ""
    return text + "."


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that scores depend on."""
    packages = {name: importlib.metadata.version(name.replace("_", "-")) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}
