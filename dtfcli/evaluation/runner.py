"""`dtf eval` without its terminal: a model and a list of tasks in, a report out."""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dtfcli.errors import CheckpointError, ConfigError, DTFError
from dtfcli.evaluation.answers import AnswerStore
from dtfcli.evaluation.harness import SEED
from dtfcli.evaluation.job_runner import EvalEvent, EvalListener, JobRunner, versions
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.evaluation.plan import EvalOptions, EvalPlan, make_plan
from dtfcli.evaluation.report import EvalReport, check_writable, is_causal, results_folder, save, shares_of
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.loading.quantization import quantization_of
from dtfcli.loading.source import ModelSource, open_source
from dtfcli.models.pretrained import is_routed
from dtfcli.quiet import quiet_libraries

UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Candidate:
    """A model to score, from `source` (None: made in memory); `load` returns the model and its tokenizer."""

    name: str
    source: ModelSource | None
    load: Callable[[], tuple[Any, Any]]


def evaluate(
    model: Any,
    tasks: str | Sequence[str] = "quick_test",
    *,
    tokenizer: Any = None,
    routing: str | None = None,
    capacity: float | None = None,
    on_event: EvalListener | None = None,
    **options: Any,
) -> EvalReport:
    """Score a model on benchmarks.

    Args:
        model: a loaded model, or anything that `load_model` takes.
        tasks: suites (general, math, code, quick_test, perplexity), lm-eval tasks and groups.
        tokenizer: for a loaded model; None: the one in the folder that it was loaded from.
        routing, capacity: for the evaluation; None: the model's own. A loaded model keeps them afterwards.
        on_event: called with every `EvalEvent`.
        options: fields of `EvalOptions`: limit, num_fewshot, batch_size, data_dir, include_path,
            confirm_run_unsafe_code, trust_remote_code (of task files).

    Returns:
        The report; nothing is written.

    Raises:
        ConfigError, DataError, CheckpointError, HubError: the input is wrong or not available.
    """
    plan = make_plan(tasks, EvalOptions(**options))
    if isinstance(model, (str, Path)):
        source = open_source(model)
        loaded: Any = load_model(source, routing=routing, capacity=capacity)
        tokenizer = tokenizer or load_tokenizer(source)
        candidate = Candidate(str(model), source, lambda: (loaded, tokenizer))
    else:
        if not is_routed(model) and (routing, capacity) != (None, None):
            raise ConfigError("routing, capacity: this is a dense model, which routes nothing; leave them out.")
        if (routing, capacity) != (None, None):
            model.set_routing(routing or model.routing, capacity)
        if tokenizer is None and not model.name_or_path:
            raise ConfigError("tokenizer: this model was not loaded from a folder with a tokenizer; give one.")
        tokenizer = tokenizer or load_tokenizer(model.name_or_path)
        candidate = Candidate(model.name_or_path or type(model).__name__, None, lambda: (model, tokenizer))
    return run_plan(plan, candidate, on_event=on_event)[0]


def evaluate_and_save(
    plan: EvalPlan, candidates: Sequence[Candidate], *, output: Path | None = None, on_event: EvalListener | None = None
) -> list[tuple[EvalReport, Path | None]]:
    """Run a plan on models, one after the other, and write the results beside each.

    Args:
        plan: the jobs.
        candidates: the models, each with a source.
        output: a file that the caller writes instead; unfinished answers are kept beside it.
        on_event: called with every `EvalEvent`.

    Returns:
        The report and the file of each model.
    """
    emit = on_event or (lambda event: None)
    folders = []
    for candidate in candidates:
        assert candidate.source is not None, "a model made in memory has no folder"
        folders.append(results_folder(candidate.name, candidate.source) if output is None else output.parent)
        check_writable(folders[-1])
    results, stores = [], []
    for candidate, folder in zip(candidates, folders, strict=True):
        emit(EvalEvent("model", candidate.name))
        report, kept = run_plan(plan, candidate, state=folder / UNFINISHED, on_event=emit)
        stores += kept
        results.append((report, save(report.to_dict(), folder) if output is None else None))
    # Not earlier: a command with several models may be killed while it scores the last one.
    for store in stores:
        store.discard()
    return results


def run_plan(
    plan: EvalPlan, candidate: Candidate, *, state: Path | None = None, on_event: EvalListener | None = None
) -> tuple[EvalReport, list[AnswerStore]]:
    """Run every job of a plan on one model, which is left in eval mode.

    Args:
        plan: the jobs.
        candidate: the model.
        state: folder that keeps the answers; None: keep none.
        on_event: called with every `EvalEvent`.

    Returns:
        The report, and the answers, to be discarded once the report is safe.

    Raises:
        ConfigError: the model cannot run a task.
        DataError: a dataset is not available.
    """
    emit = on_event or (lambda event: None)
    model, tokenizer = candidate.load()
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise CheckpointError(f"{candidate.name}: its tokenizer has no end-of-text token, which scoring needs.")
    model.eval()
    with quiet_libraries(verbose=plan.options.verbose):
        try:
            lm = RoutedLM(model, tokenizer, plan.rows)
            lm.on_answers = lambda count: emit(EvalEvent("answers", count=count))
            runner = JobRunner(plan, lm, candidate.source, state, emit)
            stores = [store for job in runner.load() for store in runner.run(job)]
        except torch.OutOfMemoryError as error:
            raise DTFError("out of memory: lower --batch-size.") from error
    quantized = quantization_of(model)
    report = EvalReport(
        model=candidate.name,
        model_hash=runner.hash,
        architecture="dense" if lm.routing == "dense" else model.config.architecture,
        routing=lm.routing,
        causal=is_causal(lm.routing),
        capacity=getattr(model, "capacity", None),
        routed_share=shares_of(runner.meter),
        tasks=plan.names,
        results=runner.results,
        skipped=runner.skipped,
        limit=plan.options.limit,
        num_fewshot=plan.options.num_fewshot,
        seed=SEED,
        batch_size=plan.rows or "auto",
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=versions(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 3),
        reused=runner.reused,
        quantize=None if quantized is None else quantized.kind,
        quantization=None if quantized is None else asdict(quantized),
        items=runner.items,
    )
    return report, stores
