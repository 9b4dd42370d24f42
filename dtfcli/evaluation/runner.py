"""`dtf eval`, without its terminal: a model and a list of tasks → a report."""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtfcli.errors import CheckpointError, ConfigError, DTFError
from dtfcli.evaluation.answers import AnswerStore
from dtfcli.evaluation.harness import SEED, Routing, quiet
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.evaluation.plan import EvalPlan, make_plan
from dtfcli.evaluation.report import EvalReport, check_writable, model_hash, results_folder, save, shares_of
from dtfcli.evaluation.session import EvalEvent, Listener, Session, versions
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.loading.paths import ModelPath, resolve_model_path

UNFINISHED = "unfinished"


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
    planned = make_plan(
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
                raise ConfigError(
                    "tokenizer: this model was not loaded from a folder that has one; give its tokenizer."
                )
            tokenizer = load_tokenizer(model.name_or_path)
    return run_plan(planned, loaded, tokenizer, name=name, source=source, on_event=on_event)[0]


@dataclass(frozen=True)
class Candidate:
    """A model that is to be scored.

    Attributes:
        name: as the user named it.
        source: what that is.
        load: gives the model and its tokenizer.
    """

    name: str
    source: ModelPath
    load: Callable[[], tuple[Any, Any]]


def evaluate_and_save(
    plan: EvalPlan, candidates: Sequence[Candidate], *, output: Path | None = None, on_event: Listener | None = None
) -> list[tuple[EvalReport, Path | None]]:
    """Run a plan on models, one after the other, and write the results beside each.

    Args:
        plan: what to run.
        candidates: the models.
        output: a file that the caller writes instead; what is unfinished is kept beside it.
        on_event: called with every `EvalEvent`.

    Returns:
        For each model its report and the file.
    """
    folders = [results_folder(c.name, c.source) if output is None else output.parent for c in candidates]
    for folder in folders:
        check_writable(folder)
    results, stores = [], []
    for candidate, folder in zip(candidates, folders, strict=True):
        if on_event is not None:
            on_event(EvalEvent("model", candidate.name))
        model, tokenizer = candidate.load()
        report, kept = run_plan(
            plan,
            model,
            tokenizer,
            name=candidate.name,
            source=candidate.source,
            state=folder / UNFINISHED,
            on_event=on_event,
        )
        del model
        stores += kept
        results.append((report, save(report.to_dict(), folder) if output is None else None))
    # Only now, so that a command with several models can be killed in the last one too.
    for store in stores:
        store.discard()
    return results


def run_plan(
    plan: EvalPlan,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    source: ModelPath | None,
    state: Path | None = None,
    on_event: Listener | None = None,
) -> tuple[EvalReport, list[AnswerStore]]:
    """Run every job of a plan.

    Args:
        plan: what to run.
        model, tokenizer: loaded; the model is left in eval mode.
        name: the model as the user named it; source: what that is, None for one that was made in memory.
        state: folder that keeps answers; None: nothing is kept.
        on_event: called with every `EvalEvent`.

    Returns:
        The report, and the answers that can be discarded once it is safe.

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
    _check_can_write(plan, routing)
    with quiet(plan.verbose):
        try:
            lm = RoutedLM(model, tokenizer, plan.batch_size)
            lm.on_answers = lambda count: emit(EvalEvent("answers", count=count))
            session = Session(plan, lm, routing, state, emit, model_hash(model, source), source)
            jobs = session.load()
            stores = session.run(jobs)
        except torch.OutOfMemoryError as error:
            raise DTFError("out of memory: lower --batch-size.") from error
    report = EvalReport(
        model=name,
        model_hash=session.hash,
        architecture=model.config.architecture if routed else "dense",
        routing=mode,
        causal=routing.causal,
        capacity=model.capacity if routed else None,
        routed_share=shares_of(session.meter),
        tasks=plan.names,
        results=session.results,
        skipped=session.skipped,
        limit=plan.limit,
        num_fewshot=plan.num_fewshot,
        seed=SEED,
        batch_size=plan.batch_size or "auto",
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=versions(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 3),
        reused=session.reused,
        items=session.items,
    )
    return report, stores


def _check_can_write(plan: EvalPlan, routing: Routing) -> None:
    """Refuse tasks in which the model writes when its routing needs the whole sequence."""
    if routing.causal:
        return
    writes = [
        leaf
        for job in plan.jobs
        for leaf, config in plan.index.configs(job.name)
        if config.get("output_type", "") == "generate_until"
    ]
    if writes:
        raise ConfigError(
            f"--routing topk: sees the whole sequence and cannot write what {', '.join(writes[:3])} asks for; leave "
            f"{'it' if len(writes) == 1 else 'them'} out or use --routing threshold."
        )
