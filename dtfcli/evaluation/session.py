"""The jobs of one model, one after the other, and what has come of them.

All data is loaded before anything is computed; what an earlier session that was stopped has answered is taken over.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.metrics import mean

from dtfcli.errors import ConfigError, DataError, DTFError
from dtfcli.evaluation import validation_text
from dtfcli.evaluation.answers import AnswerStore, fingerprint
from dtfcli.evaluation.harness import SEED, LoadedJob, Routing, load_job, score
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.evaluation.local_data import evaluated_split, fewshot_split
from dtfcli.evaluation.plan import EvalPlan
from dtfcli.evaluation.report import Items, TaskScore, run_folder_of, shares_of
from dtfcli.evaluation.suites import VALIDATION_TEXT, Job
from dtfcli.loading.paths import ModelPath
from dtfcli.shares import ShareMeter, measured_shares

_PACKAGES = ("dtfcli", "lm_eval", "torch", "transformers", "datasets")


@dataclass(frozen=True)
class EvalEvent:
    """Something to show.

    Attributes:
        kind: "model" (one is loaded: its name), "phase" (a message), "job" (one begins: its name and number of
            requests), "answers" (so many more are there), "done" (a job ends), "warning".
        message: text, or the job's name.
        count: requests.
        scores: of a job that ends, by task.
    """

    kind: Literal["model", "phase", "job", "answers", "done", "warning"]
    message: str = ""
    count: int = 0
    scores: dict[str, TaskScore] | None = None


Listener = Callable[[EvalEvent], None]


class Session:
    """The jobs of one model, and what has come of them."""

    def __init__(
        self,
        plan: EvalPlan,
        lm: RoutedLM,
        routing: Routing,
        state: Path | None,
        emit: Listener,
        weights: str,
        source: ModelPath | None,
    ) -> None:
        self.plan, self.lm, self.routing, self.state, self.emit = plan, lm, routing, state, emit
        self.hash, self.source = weights, source
        self.meter = ShareMeter() if lm.meter is not None else None
        self.results: dict[str, TaskScore] = {}
        self.items: dict[str, Items] = {}
        self.skipped: dict[str, str] = {}
        self.reused = 0

    def load(self) -> list[LoadedJob | Any]:
        """Load all data first: what is missing is said before anything is computed."""
        jobs: list[Any] = []
        for job in self.plan.jobs:
            self.emit(EvalEvent("phase", f"Loading {job.name}"))
            try:
                jobs.append(self._load(job))
            except DataError as error:
                if not job.optional:
                    raise
                self.skipped[job.name] = str(error)
                self.emit(EvalEvent("warning", f"left out: {error}"))
        return jobs

    def _load(self, job: Job) -> Any:
        if job.name == VALIDATION_TEXT:
            return self._held_out()
        loaded = load_job(job, self.plan.index, self.plan.data_dir)
        if not self.routing.causal and (
            writes := [n for n, t in loaded.tasks.items() if t.OUTPUT_TYPE == "generate_until"]
        ):
            raise ConfigError(
                f"--routing topk: cannot write what {', '.join(writes)} asks for; use --routing threshold."
            )
        for name, origin in loaded.origins.items():
            task = loaded.tasks[name]
            if origin.scored_instead or (origin.missing_splits and task.get_config("num_fewshot")):
                self.emit(EvalEvent("warning", _missing(name, origin.missing_splits, task)))
        if self.plan.num_fewshot is not None:
            fixed = [n for n, t in loaded.tasks.items() if t.get_config("num_fewshot") != self.plan.num_fewshot]
            if fixed:
                self.emit(
                    EvalEvent("warning", f"{', '.join(fixed)}: asked without examples, whatever --num-fewshot says.")
                )
        return loaded

    def _held_out(self) -> tuple[Any, float]:
        local = self.source is not None and self.source.kind == "folder"
        run = run_folder_of(Path(self.source.path)) if local and self.source is not None else None
        rows, bytes_per_token = validation_text.held_out_rows(run, self.lm.tokenizer)
        return rows if self.plan.limit is None else rows[: self.plan.limit], bytes_per_token

    def run(self, jobs: Sequence[Any]) -> list[AnswerStore]:
        """Run the loaded jobs; returns what was kept of them."""
        stores = []
        for job in jobs:
            if isinstance(job, LoadedJob):
                stores.append(self._run(job))
            else:
                self._run_held_out(*job)
        return stores

    def _run(self, job: LoadedJob) -> AnswerStore:
        name = job.job.name
        store = AnswerStore(self._state_file(job))
        self.emit(EvalEvent("job", name, job.requests()))
        try:
            results, items = score(job, self.lm, store, self.routing, self.plan.unsafe_code)
        except OSError as error:
            raise DTFError(f"{store.path}: answers cannot be kept ({error.strerror or error}).") from error
        finally:
            store.close()
        self.results |= results
        self.items |= items
        self.reused += store.reused
        if self.meter is not None and self.lm.meter is not None:
            self.meter.add_counts(self.lm.meter.counts())
        self.emit(EvalEvent("done", name, scores=results))
        return store

    def _state_file(self, job: LoadedJob) -> Path | None:
        """The file of a job's answers, named after everything they depend on."""
        if self.state is None:
            return None
        lm = self.lm
        circumstances = {
            "weights": self.hash,
            "routing": self.routing.mode,
            "capacity": getattr(lm.model, "capacity", None),
            "tasks": job.configuration(),
            "limit": job.job.limit,
            "seed": SEED,
            "rows": self.plan.batch_size,
            "device": lm.device.type,
            "dtype": str(lm.model.dtype),
            "attention": lm.model.config._attn_implementation,
            "positions": lm.max_length,
            "versions": versions(),
        }
        return self.state / f"{job.job.name}-{fingerprint(circumstances)}.jsonl"

    def _run_held_out(self, rows: Any, bytes_per_token: float) -> None:
        model, clock = self.lm.model, time.perf_counter()
        self.emit(EvalEvent("job", VALIDATION_TEXT, len(rows)))
        shares = None
        if self.meter is not None:
            with measured_shares(model) as meter:
                scores, losses = validation_text.score_rows(model, rows, bytes_per_token, self.lm.on_answers)
            self.meter.add_counts(meter.counts())
            shares = shares_of(meter)
        else:
            scores, losses = validation_text.score_rows(model, rows, bytes_per_token, self.lm.on_answers)
        result = TaskScore(
            metrics=scores,
            n=len(rows),
            n_total=None,
            shots=0,
            fewshot_from=None,
            split="validation",
            dataset="the run's own text",
            data_source="run",
            missing_splits=(),
            routing=self.routing.mode,
            causal=self.routing.causal,
            routed_share=shares,
            truncated=0,
            seconds=round(time.perf_counter() - clock, 3),
            version=None,
        )
        hashes = tuple(fingerprint(row.tolist()) for row in rows)
        self.results[VALIDATION_TEXT] = result
        self.items[VALIDATION_TEXT] = Items(
            hashes,
            {
                "loss": losses,
                "bits_per_byte": [loss * scores["bits_per_byte"].value / scores["loss"].value for loss in losses],
            },
            {"loss": mean, "bits_per_byte": mean},
        )
        self.emit(EvalEvent("done", VALIDATION_TEXT, scores={VALIDATION_TEXT: result}))


def _missing(name: str, splits: Sequence[str], task: Any) -> str:
    text = f"{name}: the data has no split {' or '.join(splits)}; scored on {evaluated_split(task)}"
    if task.get_config("num_fewshot"):
        text += f", examples from {fewshot_split(task)}"
        text += ", the item itself left out" if fewshot_split(task) == evaluated_split(task) else ""
    return text + "."


def versions() -> dict[str, str]:
    """Of Python and of the packages that scores depend on."""
    found = {name: importlib.metadata.version(name.replace("_", "-")) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}
