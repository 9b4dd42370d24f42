"""`dtf eval`, without its terminal: a model and a list of tasks → a report.

Order of events: names and options are checked before the model is loaded, datasets before anything is computed, and a
job that was begun by an earlier run that was stopped goes on where it was.
"""

import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.metrics import mean

from dtfcli.errors import CheckpointError, ConfigError, DataError, DTFError
from dtfcli.evaluation import validation_text
from dtfcli.evaluation.answers import AnswerStore, fingerprint
from dtfcli.evaluation.harness import SEED, LoadedJob, Routing, load_job, quiet, score
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.evaluation.local_data import evaluated_split, fewshot_split
from dtfcli.evaluation.report import (
    EvalReport,
    Items,
    TaskScore,
    check_writable,
    model_hash,
    results_folder,
    run_folder_of,
    save,
    shares_of,
)
from dtfcli.evaluation.suites import SUITES, VALIDATION_TEXT, Job, TaskIndex, plan_jobs, split_names
from dtfcli.factory import load_model, load_tokenizer
from dtfcli.model_paths import ModelPath, resolve_model_path
from dtfcli.shares import ShareMeter, measured_shares

UNFINISHED = "unfinished"
_PACKAGES = ("dtfcli", "lm_eval", "torch", "transformers", "datasets")


@dataclass(frozen=True)
class EvalEvent:
    """Something to show.

    Attributes:
        kind: "phase" (a message), "job" (one begins: its name and number of requests), "answers" (so many more are
            there), "done" (a job ends), "warning".
        message: text, or the job's name.
        count: requests.
        scores: of a job that ends, by task.
    """

    kind: Literal["phase", "job", "answers", "done", "warning"]
    message: str = ""
    count: int = 0
    scores: dict[str, TaskScore] | None = None


Listener = Callable[[EvalEvent], None]


@dataclass(frozen=True)
class Plan:
    """What to run and how, checked.

    Attributes:
        names: as they were asked for.
        jobs: in order.
        index: of the tasks there are.
        limit, num_fewshot, batch_size: as asked for; None: each task's own, or what fits.
        data_dir: datasets on this machine.
        unsafe_code: whether code that the model writes may be run.
        verbose: let lm-eval talk.
    """

    names: tuple[str, ...]
    jobs: tuple[Job, ...]
    index: TaskIndex
    limit: int | None
    num_fewshot: int | None
    batch_size: int | None
    data_dir: Path | None
    unsafe_code: bool
    verbose: bool


def plan(
    tasks: str | Sequence[str] = "quick_test",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    confirm_run_unsafe_code: bool = False,
    verbose: bool = False,
) -> Plan:
    """Check what was asked for, without a model or data.

    Raises:
        ConfigError: a name, folder or number is wrong, or code would be run unasked.
    """
    names = split_names(tasks)
    for option, value, least in (("--limit", limit, 1), ("--num-fewshot", num_fewshot, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"{option} {value}: a whole number of at least {least}.")
    rows = _rows(batch_size)
    folder = Path(data_dir).expanduser() if data_dir is not None else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--data-dir {data_dir}: no such folder; it holds datasets as OWNER/NAME/….")
    with quiet(verbose):
        index = TaskIndex(names, Path(include_path).expanduser() if include_path is not None else None)
    jobs = plan_jobs(names, index, num_fewshot, limit)
    unsafe = [leaf for job in jobs for leaf, config in index.configs(job.name) if config.get("unsafe_code")]
    if unsafe and not confirm_run_unsafe_code:
        raise ConfigError(
            f"--tasks {', '.join(unsafe)}: runs code that the model writes, in a sandbox; add "
            "--confirm-run-unsafe-code to allow it."
        )
    return Plan(
        names=tuple(names),
        jobs=tuple(jobs),
        index=index,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=rows,
        data_dir=folder,
        unsafe_code=confirm_run_unsafe_code,
        verbose=verbose,
    )


def _rows(batch_size: int | str) -> int | None:
    """Rows of a batch; None for "auto"."""
    if batch_size == "auto":
        return None
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1 or isinstance(batch_size, bool):
        raise ConfigError(f"--batch-size {batch_size}: a whole number of at least 1, or auto.")
    return rows


def evaluate(
    model: Any,
    tasks: str | Sequence[str] = "quick_test",
    *,
    tokenizer: Any = None,
    routing: str | None = None,
    capacity: float | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    confirm_run_unsafe_code: bool = False,
    on_event: Listener | None = None,
) -> EvalReport:
    """Score a model on benchmarks.

    Args:
        model: a loaded model, or what `load_model` takes.
        tasks: suites (general, math, code, quick_test, perplexity), lm-eval tasks and groups.
        tokenizer: of a loaded model; None: the one in the folder that it was loaded from.
        routing, capacity: for the evaluation; None: the model's own. A loaded model keeps them afterwards.
        limit: items of each task; num_fewshot: examples in each prompt; None: each task's own.
        batch_size: rows, or "auto".
        data_dir: a folder of datasets (`<owner>/<name>/…`) that goes before the Hub.
        include_path: a folder of lm-eval task files.
        confirm_run_unsafe_code: allow tasks that run code which the model writes.
        on_event: called with every `EvalEvent`.

    Returns:
        The report; nothing is written.

    Raises:
        ConfigError, DataError, CheckpointError, HubError: the input is wrong, or cannot be had.
    """
    planned = plan(
        tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        data_dir=data_dir,
        include_path=include_path,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    if isinstance(model, (str, Path)):
        name = str(model)
        loaded: Any = load_model(model, routing=routing, capacity=capacity)
        tokenizer = tokenizer or load_tokenizer(model)
        source: ModelPath | None = resolve_model_path(model)
    else:
        name, loaded, source = model.name_or_path or type(model).__name__, model, None
        if routing is not None or capacity is not None:
            if not hasattr(model, "set_routing"):
                raise ConfigError("routing, capacity: this is a dense model, which routes nothing; leave them out.")
            model.set_routing(routing or model.routing, capacity)
        if tokenizer is None:
            if not model.name_or_path:
                raise ConfigError("tokenizer: this model was not loaded from a folder that has one; give its tokenizer.")
            tokenizer = load_tokenizer(model.name_or_path)
    return run_plan(planned, loaded, tokenizer, name=name, source=source, on_event=on_event)


def evaluate_and_save(
    planned: Plan,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    source: ModelPath,
    output: Path | None = None,
    on_event: Listener | None = None,
) -> tuple[EvalReport, Path | None]:
    """As `run_plan`, with the results written beside the model, or nowhere where `output` names the place.

    Args:
        planned: what to run.
        model, tokenizer: loaded.
        name: the model as the user named it; source: what that is.
        output: a file that the caller writes; what is unfinished is kept beside it.
        on_event: called with every `EvalEvent`.

    Returns:
        The report and its file.
    """
    folder = results_folder(name, source) if output is None else output.parent
    check_writable(folder)
    report = run_plan(
        planned, model, tokenizer, name=name, source=source, state=folder / UNFINISHED, on_event=on_event
    )
    return report, save(report.to_dict(), folder) if output is None else None


def run_plan(
    planned: Plan,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    source: ModelPath | None,
    state: Path | None = None,
    on_event: Listener | None = None,
) -> EvalReport:
    """Run every job of a plan.

    Args:
        planned: what to run.
        model, tokenizer: loaded; the model is left in eval mode.
        name: the model as the user named it; source: what that is, None for one that was made in memory.
        state: folder that keeps answers until all jobs are done; None: nothing is kept.
        on_event: called with every `EvalEvent`.

    Raises:
        ConfigError: the model cannot do what a task asks for.
        DataError: a dataset cannot be had.
    """
    emit = on_event or (lambda event: None)
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise CheckpointError(f"{name}: its tokenizer has no end-of-text token, which scoring starts a text with.")
    routed = hasattr(model, "set_routing")
    mode = model.routing if routed else "dense"
    routing = Routing(mode, mode != "topk")
    model.eval()
    _check_can_write(planned, routing)
    with quiet(planned.verbose):
        try:
            lm = RoutedLM(model, tokenizer, planned.batch_size)
            lm.on_answers = lambda count: emit(EvalEvent("answers", count=count))
            session = _Session(planned, lm, routing, state, emit, model_hash(model, source), source)
            jobs = session.load()
            session.run(jobs)
        except torch.OutOfMemoryError as error:
            raise DTFError("out of memory: lower --batch-size.") from error
    return EvalReport(
        model=name,
        model_hash=session.hash,
        architecture=model.config.architecture if routed else "dense",
        routing=mode,
        causal=routing.causal,
        capacity=model.capacity if routed else None,
        routed_share=shares_of(session.meter),
        tasks=planned.names,
        results=session.results,
        skipped=session.skipped,
        limit=planned.limit,
        num_fewshot=planned.num_fewshot,
        seed=SEED,
        batch_size=planned.batch_size or "auto",
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=_versions(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 3),
        reused=session.reused,
        items=session.items,
    )


def _check_can_write(planned: Plan, routing: Routing) -> None:
    """Refuse tasks in which the model writes when its routing needs the whole sequence."""
    if routing.causal:
        return
    writes = [
        leaf
        for job in planned.jobs
        for leaf, config in planned.index.configs(job.name)
        if config.get("output_type", "") == "generate_until"
    ]
    if writes:
        raise ConfigError(
            f"--routing topk: sees the whole sequence and cannot write what {', '.join(writes[:3])} asks for; leave "
            f"{'it' if len(writes) == 1 else 'them'} out or use --routing threshold."
        )


class _Session:
    """The jobs of one model, and what has come of them."""

    def __init__(
        self,
        planned: Plan,
        lm: RoutedLM,
        routing: Routing,
        state: Path | None,
        emit: Listener,
        weights: str,
        source: ModelPath | None,
    ) -> None:
        self.planned, self.lm, self.routing, self.state, self.emit = planned, lm, routing, state, emit
        self.hash, self.source = weights, source
        self.meter = ShareMeter() if lm.meter is not None else None
        self.results: dict[str, TaskScore] = {}
        self.items: dict[str, Items] = {}
        self.skipped: dict[str, str] = {}
        self.reused = 0

    def load(self) -> list[LoadedJob | Any]:
        """Load all data first: what is missing is said before anything is computed."""
        jobs: list[Any] = []
        for job in self.planned.jobs:
            self.emit(EvalEvent("phase", f"Loading {job.name}"))
            try:
                jobs.append(self._load(job))
            except (DataError, validation_text.NotAvailable) as error:
                if not job.optional or len(self.planned.jobs) == 1:
                    raise
                self.skipped[job.name] = str(error)
                self.emit(EvalEvent("warning", f"{job.name} is left out: {error}"))
        return jobs

    def _load(self, job: Job) -> Any:
        if job.name == VALIDATION_TEXT:
            return self._held_out()
        loaded = load_job(job, self.planned.index, self.planned.data_dir)
        if not self.routing.causal and (writes := [n for n, t in loaded.tasks.items() if t.OUTPUT_TYPE == "generate_until"]):
            raise ConfigError(f"--routing topk: cannot write what {', '.join(writes)} asks for; use --routing threshold.")
        for name, origin in loaded.origins.items():
            task = loaded.tasks[name]
            if origin.scored_instead or (origin.missing_splits and task.get_config("num_fewshot")):
                self.emit(EvalEvent("warning", _missing(name, origin.missing_splits, task)))
        if self.planned.num_fewshot is not None:
            fixed = [n for n, t in loaded.tasks.items() if t.get_config("num_fewshot") != self.planned.num_fewshot]
            if fixed:
                self.emit(EvalEvent("warning", f"{', '.join(fixed)}: has its examples in the prompt and stays at 0 shots."))
        return loaded

    def _held_out(self) -> tuple[Any, float]:
        local = self.source is not None and self.source.kind == "folder"
        run = run_folder_of(Path(self.source.path)) if local and self.source is not None else None
        rows, bytes_per_token = validation_text.held_out_rows(run, self.lm.tokenizer)
        return rows if self.planned.limit is None else rows[: self.planned.limit], bytes_per_token

    def run(self, jobs: Sequence[Any]) -> None:
        """Run the loaded jobs; what was kept of them goes when all are done."""
        stores = []
        for job in jobs:
            if isinstance(job, LoadedJob):
                stores.append(self._run(job))
            else:
                self._run_held_out(*job)
        for store in stores:
            store.close(finished=True)
        if self.state is not None and self.state.is_dir() and not any(self.state.iterdir()):
            self.state.rmdir()

    def _run(self, job: LoadedJob) -> AnswerStore:
        name = job.job.name
        store = AnswerStore(self._state_file(job))
        self.emit(EvalEvent("job", name, job.requests()))
        try:
            results, items = score(job, self.lm, store, self.routing, self.planned.unsafe_code)
        except OSError as error:
            raise DTFError(f"{store.path}: answers cannot be kept ({error.strerror or error}).") from error
        finally:
            store.close(finished=False)
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
            "rows": self.planned.batch_size,
            "device": lm.device.type,
            "dtype": str(lm.model.dtype),
            "attention": lm.model.config._attn_implementation,
            "positions": lm.max_length,
            "versions": _versions(),
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
        self.items[VALIDATION_TEXT] = Items(hashes, {"loss": losses}, {"loss": mean})
        self.emit(EvalEvent("done", VALIDATION_TEXT, scores={VALIDATION_TEXT: result}))


def _missing(name: str, splits: Sequence[str], task: Any) -> str:
    text = f"{name}: the data has no split {' or '.join(splits)}; scored on {evaluated_split(task)}"
    if task.get_config("num_fewshot"):
        text += f", examples from {fewshot_split(task)}"
        text += ", the item itself left out" if fewshot_split(task) == evaluated_split(task) else ""
    return text + "."


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name.replace("_", "-")) for name in _PACKAGES}
    return {"python": platform.python_version(), **versions}
