"""`eval.after`: benchmarks on the final model, checked before the first step and run after the last.

lm-eval is imported only where a run asks for it.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dtfcli.errors import ConfigError, DTFError
from dtfcli.loading.paths import resolve_model_path
from dtfcli.settings import Settings
from dtfcli.training.tracking import Event, Listener

if TYPE_CHECKING:
    from dtfcli.evaluation.job_runner import EvalEvent
    from dtfcli.evaluation.plan import EvalPlan


def plan_evaluation(settings: Settings) -> "EvalPlan | None":
    """What to run after training; None for nothing.

    Raises:
        ConfigError: a task is unknown, or cannot be run from a training run. Better said now than after it.
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


def evaluate_final(settings: Settings, plan: "EvalPlan", run: Path, emit: Listener) -> Path | None:
    """Score the final model of a finished run.

    Returns:
        The file with the scores; None where it failed, which is told as a warning: the model is there, and the
        command that repeats the evaluation is in the message.
    """
    from dtfcli.evaluation.runner import Candidate, evaluate_and_save
    from dtfcli.loading.load import load_model, load_tokenizer

    name, total, done = "", 0, 0

    def show(event: "EvalEvent") -> None:
        nonlocal name, total, done
        if event.kind == "warning":
            emit(Event("warning", event.message))
        elif event.kind == "job":
            name, total, done = event.message, event.count, 0
        done += event.count if event.kind == "answers" else 0
        if event.kind in ("job", "answers"):
            emit(Event("phase", f"Benchmark {name}", fraction=min(1.0, done / total) if total else None))

    command = ["dtf", "eval", str(run), "--tasks", ",".join(plan.names)]
    command += ["--limit", str(plan.limit)] if plan.limit is not None else []
    command += ["--data-dir", str(plan.data_dir)] if plan.data_dir is not None else []
    again = f"The final model is saved; repeat its evaluation with: {shlex.join(command)}"
    try:
        final = Candidate(
            str(run),
            resolve_model_path(run),
            lambda: (load_model(run, device=settings.run.device, dtype=settings.run.dtype), load_tokenizer(run)),
        )
        _, file = evaluate_and_save(plan, [final], on_event=show)[0]
    except KeyboardInterrupt:
        emit(Event("warning", again))
        raise
    except Exception as error:  # whatever it is, the run has its model
        problem = str(error) if isinstance(error, DTFError) else f"{type(error).__name__}: {error}"
        emit(Event("warning", f"The evaluation failed. {problem}\n{again}"))
        return None
    return file
