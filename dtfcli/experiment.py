"""A whole experiment: train → benchmark → publish.

In: settings. Out: a `TrainResult`. A benchmark that fails or a push that is refused never loses the trained model: it
becomes a warning with the command that repeats it.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dtfcli.cost.accounting import Account, describe
from dtfcli.errors import ConfigError, DTFError
from dtfcli.loading.adapters import adapt
from dtfcli.loading.build import build_model, build_tokenizer
from dtfcli.loading.devices import compute_dtype, resolve_device
from dtfcli.loading.load import load_model_and_tokenizer
from dtfcli.loading.source import open_source
from dtfcli.runs.folder import MERGED_MODEL
from dtfcli.settings import Settings
from dtfcli.settings.after import HubSettings
from dtfcli.training.distributed import is_main_process
from dtfcli.training.events import TrainEvent, TrainListener
from dtfcli.training.loop import TrainResult, train_model
from dtfcli.training.plan import TrainPlan, for_processes, plan_run

if TYPE_CHECKING:
    from dtfcli.evaluation.job_runner import EvalEvent
    from dtfcli.evaluation.plan import EvalPlan


def train(
    settings: Settings, *, resume: Path | None = None, rename: bool = False, on_event: TrainListener | None = None
) -> TrainResult:
    """Train a model as the settings say; then run `eval.after` and push to `hub.repo`, where they are set.

    Args:
        settings: of the run; of a resumed run, from its folder (`runs.folder.run_settings`).
        resume: the folder of a run to go on with.
        rename: give a new run another name when its name is taken, instead of refusing.
        on_event: called with every `TrainEvent`.

    Raises:
        TrainingInterrupted: by Ctrl-C or SIGTERM, after a checkpoint was saved.
        TrainingDiverged: the loss became infinite or NaN; the last good checkpoint is kept.
        ConfigError, DataError, CheckpointError, HubError: the input is wrong.
        DTFError: the run folder cannot be written.
    """
    emit = on_event if on_event and is_main_process() else lambda event: None
    plan = plan_evaluation(settings)
    if settings.hub.repo:
        from huggingface_hub import get_token  # sends no request

        if get_token() is None:
            warning = f"hub.repo = {settings.hub.repo!r}: not logged in; run `hf auth login` meanwhile."
            emit(TrainEvent("warning", warning))
    result = train_model(settings, resume=resume, rename=rename, emit=emit)
    if not is_main_process():
        return result
    if plan is not None:
        result = replace(result, evaluation=_evaluate_final(settings, plan, result.run_dir, emit))
    # After the benchmarks, so that the card shows them.
    merged = result.run_dir / MERGED_MODEL
    pushed = merged if merged.exists() else result.final_model_path
    return replace(result, hub_url=_push_final(settings.hub, pushed, emit))


@contextmanager
def _never_lost(failure: str, again: str, emit: TrainListener) -> Iterator[None]:
    """Turn any failure after training into a warning: the run has its model, and `again` repeats the rest."""
    try:
        yield
    except KeyboardInterrupt:
        emit(TrainEvent("warning", again))
        raise
    except Exception as error:
        problem = str(error) if isinstance(error, DTFError) else f"{type(error).__name__}: {error}"
        emit(TrainEvent("warning", f"{failure} {problem}\n{again}"))


def plan_evaluation(settings: Settings) -> "EvalPlan | None":
    """The benchmarks after training, or None; lm-eval is imported only for them.

    Raises:
        ConfigError: a task is unknown, or cannot run after training.
    """
    if not settings.eval.after:
        return None
    from dtfcli.evaluation.plan import EvalOptions, NotConfirmed, make_plan

    try:
        return make_plan(
            [settings.eval.after, *settings.eval.tasks],
            EvalOptions(limit=settings.eval.limit, data_dir=settings.eval.data_dir or None),
        )
    except NotConfirmed as error:
        raise ConfigError(
            f"eval.after = {settings.eval.after!r}: runs code that the model writes, which a training run does not. "
            "Leave it out, and use dtf eval RUN --tasks code --confirm-run-unsafe-code afterwards."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"eval.after = {settings.eval.after!r}: {error}") from error


def _evaluate_final(settings: Settings, plan: "EvalPlan", run: Path, emit: TrainListener) -> Path | None:
    """Score the final model of a finished run; returns the file with the scores, None where that failed."""
    from dtfcli.evaluation.runner import Candidate, evaluate_and_save

    name, total, answered = "", 0, 0

    def show(event: "EvalEvent") -> None:
        nonlocal name, total, answered
        if event.kind == "warning":
            emit(TrainEvent("warning", event.message))
        elif event.kind == "job":
            name, total, answered = event.message, event.count, 0
        answered += event.count if event.kind == "answers" else 0
        if event.kind in ("job", "answers"):
            emit(TrainEvent("phase", f"Benchmark {name}", fraction=min(1.0, answered / total) if total else None))

    command = ["dtf", "eval", str(run), "--tasks", ",".join(plan.names)]
    command += ["--limit", str(plan.options.limit)] if plan.options.limit is not None else []
    command += ["--data-dir", str(plan.data_dir)] if plan.data_dir is not None else []
    again = f"The final model is saved; repeat its evaluation with: {shlex.join(command)}"
    with _never_lost("The evaluation failed.", again, emit):
        source, options = open_source(run), {"device": settings.run.device, "dtype": settings.run.dtype}
        final = Candidate(str(run), source, lambda: load_model_and_tokenizer(source, **options))
        return evaluate_and_save(plan, [final], on_event=show)[0][1]
    return None


def _push_final(hub: HubSettings, model: Path, emit: TrainListener) -> str | None:
    """Push a saved model where `hub.repo` says; returns the URL, None without `hub.repo` or where that failed."""
    if not hub.repo:
        return None
    from dtfcli.hub.push import push
    from dtfcli.hub.upload import PushOptions

    private = " --private" if hub.private else ""
    again = f"The model is saved. Push it with: dtf push {shlex.quote(str(model))} {hub.repo}{private}"
    with _never_lost("Not pushed:", again, emit):
        result = push(
            model,
            hub.repo,
            PushOptions(private=hub.private),
            on_progress=lambda message: emit(TrainEvent("phase", message[0].upper() + message[1:])),
        )
        for warning in result.upload.warnings:
            emit(TrainEvent("warning", warning))
        return result.url
    return None


@dataclass(frozen=True)
class Preview:
    """The cost of a run.

    Attributes:
        settings: resolved; `training.tokens_per_update` is that of all processes.
        account: parameters, FLOPs and memory of the model.
        plan: sizes of the run; None where the number of steps follows from text that was not read.
    """

    settings: Settings
    account: Account
    plan: TrainPlan | None


def preview(settings: Settings, processes: int | None = None) -> Preview:
    """Check the settings, build the model on the meta device, and count the cost of a run.

    Args:
        settings: of the run.
        processes: that share the work; None: one.

    Raises:
        ConfigError: a setting is wrong.
    """
    dtype = str(compute_dtype(settings.run.dtype, resolve_device(settings.run.device))).removeprefix("torch.")
    tokenizer = None if settings.model.base or not settings.data.tokenizer else build_tokenizer(settings)
    model = adapt(build_model(settings, meta=True, tokenizer=tokenizer), settings)
    if processes is not None:
        settings = for_processes(settings, processes)
    account = describe(
        model,
        seq_len=settings.data.seq_len,
        micro_batch_size=settings.training.micro_batch_size,
        dtype=dtype,
        checkpointing=settings.training.gradient_checkpointing,
        parent=settings.distill.enabled and not settings.shares_parent,
        nf4=settings.lora.quantize == "nf4",
    )
    return Preview(settings, account, plan_run(settings, None))
