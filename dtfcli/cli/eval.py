"""`dtf eval`: benchmarks for one model, or for several side by side."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtfcli.cli import options

if TYPE_CHECKING:
    from dtfcli.evaluation.report import EvalReport, TaskScore
    from dtfcli.evaluation.session import EvalEvent

_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "word_perplexity", "loss")


Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Model folders, run folders (their final models), .gguf files or Hub ids; several are compared.",
        show_default=False,
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        "-t",
        metavar="LIST",
        help="Suites (general, math, code, quick_test, perplexity), lm-eval tasks and groups, with commas.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", help="Score only the first so many items of each task.", show_default=False),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot", help="Examples in each prompt; unset: the suite's or task's own.", show_default=False
    ),
]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        help="Rows of a forward pass; auto: what fits into memory, but one where a CPU scores with a dense model.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="A folder of datasets as OWNER/NAME/…, used instead of the Hub.", show_default=False
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option("--include-path", help="A folder with your own lm-eval task files (.yaml).", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Write the results to this file instead of beside the model.", show_default=False),
]
ConfirmRunUnsafeCode = Annotated[
    bool,
    typer.Option("--confirm-run-unsafe-code", help="Let the code suite run what the model writes, in a sandbox."),
]


def evaluate(
    models: Models,
    tasks: Tasks = "quick_test",
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    batch_size: BatchSize = "auto",
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    output: Output = None,
    confirm_run_unsafe_code: ConfirmRunUnsafeCode = False,
    routing: options.Routing = "auto",
    capacity: options.Capacity = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attn_implementation: options.AttnImplementation = "sdpa",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Score models on benchmarks with lm-evaluation-harness; several models are compared item by item.

    Results go to eval/ beside the model. What was stopped half-way goes on where it was.

    \b
    Examples:
      dtf eval outputs/2026-01-31/quickstart
      dtf eval MODEL --tasks general --limit 20 --data-dir benchmarks
      dtf eval MODEL --tasks arc_easy,mmlu_anatomy --capacity 0.25
      dtf eval outputs/2026-01-31/quickstart outputs/2026-01-31/mod outputs/2026-01-31/dense
    """
    from dtfcli.cli import render
    from dtfcli.errors import ConfigError
    from dtfcli.loading.paths import resolve_model_path

    if output is not None and output.exists():
        raise ConfigError(f"--output {output}: exists already; name another file.")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} does not exist. Make it first.")
    sources = [resolve_model_path(model, revision) for model in models]
    if len(set(models)) < len(models):
        raise ConfigError(f"MODEL: {next(m for m in models if models.count(m) > 1)} is named twice; name it once.")

    with _Progress() as show:
        from dtfcli.evaluation.compare import compare
        from dtfcli.evaluation.plan import make_plan
        from dtfcli.evaluation.report import write_document
        from dtfcli.evaluation.runner import Candidate, evaluate_and_save
        from dtfcli.loading.load import load_model, load_tokenizer

        planned = make_plan(
            tasks,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            data_dir=data_dir,
            include_path=include_path,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            verbose="--debug" in sys.argv,
        )

        def load(model: str) -> tuple[Any, Any]:
            loaded = load_model(
                model,
                routing=routing,
                capacity=capacity,
                device=device,
                dtype=dtype,
                revision=revision,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
            return loaded, load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)

        candidates = [
            Candidate(model, source, partial(load, model)) for model, source in zip(models, sources, strict=True)
        ]
        show.several = len(models) > 1
        found = evaluate_and_save(planned, candidates, output=output, on_event=show)
    reports = [report for report, _ in found]
    files = [file for _, file in found]
    document: Any = reports[0]
    if len(reports) > 1:
        document = {"models": reports, "comparison": compare(reports)}
    if output is not None:
        write_document(document, output)
    if json:
        from dtfcli.evaluation.report import plain

        render.emit_json(plain(document))
    elif len(reports) > 1:
        _show_side_by_side(reports, document["comparison"])
    else:
        _show_report(reports[0])
    for file in [output] if output is not None else files:
        render.note(f"Results: {file}")


class _Progress:
    """A bar with the time that is left for each job where stderr is a terminal, a line for each elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from dtfcli.cli import render

        self.several = False
        self._model = ""
        self._warned: set[str] = set()
        self._render = render
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=render.err,
            transient=True,
            disable=not render.err.is_terminal,
        )
        self._task = self._bars.add_task("Starting", total=None)

    def __enter__(self) -> "_Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: "EvalEvent") -> None:
        """Show an event."""
        place = f"{self._model}: {event.message}" if self.several else event.message
        if event.kind == "warning":
            if event.message not in self._warned:  # once is enough for several models
                self._render.warn(event.message)
            self._warned.add(event.message)
        elif event.kind == "model":
            self._model = event.message
            self._bars.reset(self._task, total=None, description=f"Loading {event.message}")
        elif event.kind == "phase":
            self._bars.reset(self._task, total=None, description=event.message)
        elif event.kind == "job":
            self._bars.reset(self._task, total=event.count, description=place)
            if not self._render.err.is_terminal:
                self._render.note(f"{place}: {event.count} requests …")
        elif event.kind == "answers":
            self._bars.advance(self._task, event.count)
        elif event.scores:
            score = event.scores.get(event.message) or next(iter(event.scores.values()))
            self._render.note(f"{place}: {_in_short(score)}")


def _in_short(score: "TaskScore") -> str:
    metric = _main_metric(score)
    return f"{metric} {_figure(score, metric)}" if metric else f"{len(score.subtasks)} tasks"


def _main_metric(score: "TaskScore") -> str | None:
    for wanted in _MAIN_METRICS:
        for metric in score.metrics:
            if metric.partition(",")[0] == wanted:
                return metric
    return next(iter(score.metrics), None)


def _figure(score: "TaskScore", metric: str) -> str:
    found = score.metrics[metric]
    return _number(found.value) + ("" if found.stderr is None else f" ± {_number(found.stderr)}")


def _number(value: float, sign: str = "") -> str:
    """Four decimals, and no more digits of large numbers than one can believe."""
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def _top_level(report: "EvalReport") -> list[str]:
    """Names of the results that are no members of another."""
    members: set[str] = set()
    for score in report.results.values():
        members |= set(score.subtasks)
    return [name for name in report.results if name not in members]


def _heading(report: "EvalReport") -> str:
    if report.architecture == "dense":
        return f"{report.model}: dense, {report.device} {report.dtype}"
    causal = "causal" if report.causal else "NOT causal: each token's path depends on later ones"
    share = report.routed_share["overall"] if report.routed_share else None
    routed = f", {share:.0%} of the tokens routed" if share is not None else ""
    return f"{report.model}: {report.architecture}, routing {report.routing} ({causal}), γ {report.capacity}{routed}"


def _show_report(report: "EvalReport") -> None:
    from dtfcli.cli import render

    rows = []
    for name in _top_level(report):
        score = report.results[name]
        for metric in score.metrics or [None]:
            share = f"{score.routed_share['overall']:.2f}" if score.routed_share else ""
            shots = "" if score.shots is None else str(score.shots)
            of = f" of {score.n_total}" if score.n_total and score.n_total > score.n else ""
            first = metric == next(iter(score.metrics), None)
            rows.append(
                [
                    name if first else "",
                    metric or "",
                    _figure(score, metric) if metric else "",
                    f"{score.n}{of}" if first else "",
                    shots if first else "",
                    share if first else "",
                ]
            )
    routed = report.routed_share is not None
    columns = ["task", "metric", "score", "items", "shots", *(["routed"] if routed else [])]
    render.out.print(_heading(report), markup=False, soft_wrap=True)
    render.out.print(render.table(columns, [row if routed else row[:-1] for row in rows]))
    _show_remarks([report])


def _show_side_by_side(reports: list["EvalReport"], comparison: Any) -> None:
    from dtfcli.cli import render

    letters = [chr(ord("A") + place) for place in range(len(reports))]
    for letter, report in zip(letters, reports, strict=True):
        render.out.print(f"{letter}  {_heading(report)}", markup=False, soft_wrap=True)
    found = {(d.model, d.task, d.metric): d for d in comparison}
    rows = []
    for name in _top_level(reports[0]):
        for metric in reports[0].results[name].metrics:
            for letter, report in zip(letters, reports, strict=True):
                score = report.results.get(name)
                figure = _figure(score, metric) if score is not None and metric in score.metrics else "–"
                difference = found.get((report.model, name, metric))
                first = [name, metric] if report is reports[0] else ["", ""]
                rows.append([*first, letter, figure, "" if difference is None else _difference(difference)])
    render.out.print(render.table(["task", "metric", "", "score", "minus A"], rows))
    paired = "A difference's standard error is over the same items"
    unpaired = "; * over different ones" if any(not d.paired for d in comparison) else ""
    render.out.print(f"± one standard error. {paired}{unpaired}.", soft_wrap=True)
    _show_remarks(reports)


def _difference(difference: Any) -> str:
    text = _number(difference.value, "+")
    if difference.stderr is not None:
        text += f" ± {_number(difference.stderr)}"
    return text if difference.paired else f"{text}*"


def _show_remarks(reports: list["EvalReport"]) -> None:
    """What makes figures less than they seem."""
    from dtfcli.cli import render

    for report in reports:
        cut = {name: score.truncated for name, score in report.results.items() if score.truncated}
        if cut:
            tasks = ", ".join(f"{name} {count}" for name, count in cut.items())
            render.note(f"{report.model}: prompts longer than its positions lost their beginning ({tasks}).")
        if borrowed := [n for n in _top_level(report) if "excluded" in (report.results[n].fewshot_from or "")]:
            render.note(
                f"{report.model}: {', '.join(borrowed)}: the examples in the prompts are other items of the split that "
                "is scored, since the data has no other."
            )
        if not report.causal:
            render.note(f"{report.model}: routing {report.routing} is not causal; no such score can be had in use.")
        for name, reason in report.skipped.items():
            render.note(f"{report.model}: {name} was left out. {reason}")
        for name, score in report.results.items():
            for remark in score.notes:
                render.note(f"{report.model}: {name}: {remark}.")
