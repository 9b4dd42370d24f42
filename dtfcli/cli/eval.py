"""`dtf eval`: benchmarks for one model, or for several side by side."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError

if TYPE_CHECKING:
    from dtfcli.evaluation.report import EvalReport

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Model folders, run folders (their final models), .gguf files or Hub ids; several are compared.",
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        "-t",
        metavar="LIST",
        help="Suites (general, math, code, quick_test, perplexity), lm-eval tasks and groups, separated by commas.",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="Score only the first N items of each task.", metavar="N")]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot", help="Examples in each prompt. Default: the number of the suite or task.", metavar="N"
    ),
]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        help="Rows of a forward pass. auto: what fits into memory, but one row for a dense model on a CPU.",
    ),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="A folder of datasets as OWNER/NAME/…, used instead of the Hub.")
]
IncludePath = Annotated[
    Path | None,
    typer.Option(
        "--include-path",
        help="A folder with your own lm-eval task files (.yaml); Python code in them needs --trust-remote-code.",
    ),
]
Output = Annotated[Path | None, options.new_file("--output", "Write the results to this file, not beside the model.")]
ConfirmRunUnsafeCode = Annotated[
    bool,
    typer.Option(
        "--confirm-run-unsafe-code", help="Allow the code suite to run code that the model writes, in a sandbox."
    ),
]


@options.opens_models()
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
    *,
    loading: options.Loading,
    json: options.Json = False,
) -> None:
    """Score models on benchmarks with lm-evaluation-harness; several models are compared item by item.

    Results go to eval/ beside the model. A stopped evaluation continues when you start it again.

    \b
    Examples:
      dtf eval outputs/2026-01-31/quickstart
      dtf eval MODEL --tasks general --limit 20 --data-dir benchmarks
      dtf eval MODEL --tasks arc_easy,mmlu_anatomy --capacity 0.25
      dtf eval MODEL --tasks arc_easy --quantize int8
      dtf eval outputs/2026-01-31/quickstart outputs/2026-01-31/dense
    """
    from dtfcli.cli import eval_view
    from dtfcli.loading.source import open_source

    if len(set(models)) < len(models):
        raise ConfigError(f"MODEL: {next(m for m in models if models.count(m) > 1)} is named twice; name it once.")
    trust = loading.trust_remote_code
    sources = [open_source(model, loading.revision, trust_remote_code=trust) for model in models]
    with eval_view.EvalProgress(several=len(models) > 1) as show:
        from dtfcli.evaluation.plan import EvalOptions, make_plan
        from dtfcli.evaluation.runner import Candidate, evaluate_and_save

        eval_options = EvalOptions(
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            data_dir=data_dir,
            include_path=include_path,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            trust_remote_code=trust,
            verbose="--debug" in sys.argv,
        )
        candidates = [
            Candidate(m, source, partial(loading.open, source)) for m, source in zip(models, sources, strict=True)
        ]
        results = evaluate_and_save(make_plan(tasks, eval_options), candidates, output=output, on_event=show)
    files = [file for _, file in results if file is not None]
    _finish([report for report, _ in results], files, output, json)


def _finish(reports: list["EvalReport"], files: list[Path], output: Path | None, json: bool) -> None:
    """Write `output` and show the reports."""
    from dtfcli.cli import eval_view, render
    from dtfcli.evaluation.report import write_document
    from dtfcli.evaluation.side_by_side import score_differences

    differences = score_differences(reports)
    document: Any = {"models": reports, "comparison": differences} if len(reports) > 1 else reports[0]
    if output is not None:
        write_document(document, output)
    if json:
        render.emit_json(document)
    elif len(reports) > 1:
        eval_view.show_side_by_side(reports, differences)
    else:
        eval_view.show_report(reports[0])
    for file in [output] if output is not None else files:
        render.note(f"Results: {file}")
