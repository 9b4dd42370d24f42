"""`dtf compare`: the same training at every point of a grid, and what differs, with error bars."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError

if TYPE_CHECKING:
    from dtfcli.studies.grid import Cell, PlannedRun
    from dtfcli.studies.report import Finished, StudyReport

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PRESET] [KEY=VALUE]...",
        help="A preset, then settings of all runs. A point that does not read one goes without it.",
        autocompletion=options.complete_preset_or_setting,
        show_default=False,
    ),
]
Vary = Annotated[
    list[str] | None,
    typer.Option(
        "--vary", metavar="KEY=A,B,…", help="An axis of the grid; may be given several times.", show_default=False
    ),
]
Seeds = Annotated[str, typer.Option("--seeds", metavar="N|A,B,…", help="Seeds of each point: their number, or a list.")]
Plan = Annotated[bool, typer.Option("--plan", help="Show the runs, their tokens, time and disk, and stop.")]
Parallel = Annotated[int, typer.Option("--parallel", min=1, help="Runs at once.")]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of the runs and of the report.")]
Against = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="POINT",
        help="Control of the differences: a point, or a value such as random, which stands for the point that has it "
        "and is like the other in the rest. May be given several times. Default: random, else dense.",
        show_default=False,
    ),
]
From = Annotated[
    list[Path] | None,
    typer.Option("--from", metavar="RUN", help="Report on runs that exist, instead of a grid.", show_default=False),
]
NoBench = Annotated[bool, typer.Option("--no-bench", help="Do not measure the time of the trained models.")]


def compare(
    arguments: Arguments = None,
    vary: Vary = None,
    seeds: Seeds = "3",
    plan: Plan = False,
    parallel: Parallel = 1,
    output: Output = Path("study"),
    against: Against = None,
    from_runs: From = None,
    no_bench: NoBench = False,
    json: options.Json = False,
) -> None:
    """Train a grid of runs on equal terms and report what differs: is routing worth it, and whose?

    Runs of one seed share the initial backbone, the order of the data and what is held out. Start the command again
    to go on after a stop; finished runs are reused. The last line on stdout is the page with the report.

    \b
    Examples:
      dtf compare quickstart --vary model=dtf,mod,random,layerdrop,dense --seeds 2 training.max_steps=60
      dtf compare quickstart --vary model=dtf,mod --vary model.capacity=0.25,0.5 --plan
      dtf compare --from outputs/2026-01-31/dtf-1 --from outputs/2026-01-31/mod-1
    """
    from dtfcli.cli import compare_view, render
    from dtfcli.studies.output import write_report

    if from_runs:
        if vary or arguments:
            raise ConfigError("--from: reports on runs that exist; leave PRESET, settings and --vary out.")
        report = _report_on(from_runs, against, no_bench)
        output.mkdir(parents=True, exist_ok=True)
    else:
        runs = _grid(arguments, vary, seeds, output)
        if plan:
            compare_view.show_plan(runs, json)
            return
        report = _train_and_report(runs, parallel, against, no_bench, output)
    files = write_report(report, output)
    if json:
        render.emit_json(report.to_dict())
        return
    compare_view.show_report(report)
    render.emit(str(files[-1]))


def _grid(arguments: list[str] | None, vary: list[str] | None, seeds: str, output: Path) -> "list[PlannedRun]":
    from dtfcli.settings import presets
    from dtfcli.studies.grid import parse_axes, parse_seeds, plan_grid

    preset, overrides = options.split_preset(arguments)
    if preset is None:
        raise ConfigError("PRESET: name one, such as quickstart: all runs of a study start from the same settings.")
    presets.read_preset(preset)
    return plan_grid(preset, parse_axes(vary or []), parse_seeds(seeds), overrides, output)


def _train_and_report(
    runs: "list[PlannedRun]", parallel: int, against: list[str] | None, no_bench: bool, output: Path
) -> "StudyReport":
    from dtfcli.cli import compare_view
    from dtfcli.studies.execute import execute
    from dtfcli.studies.measure import measure
    from dtfcli.studies.pairs import pair_up
    from dtfcli.studies.report import Finished

    pair_up(_different(run.cell for run in runs), against or ())
    with compare_view.StudyProgress(runs) as show:
        folders = execute(runs, parallel, show)
    done = []
    for run in runs:
        folder = folders[run.settings.run.name]
        done.append(Finished(run.cell, run.seed, folder, measure(folder)))
    return _report(done, against, no_bench)


def _report_on(folders: list[Path], against: list[str] | None, no_bench: bool) -> "StudyReport":
    from dtfcli.studies.existing import finished_runs

    return _report(finished_runs(folders), against, no_bench)


def _report(done: "list[Finished]", against: list[str] | None, no_bench: bool) -> "StudyReport":
    from dtfcli.studies.pairs import pair_up
    from dtfcli.studies.report import make_report

    cells = _different(run.cell for run in done)
    if len(cells) < 2:
        raise ConfigError(f"--from: all runs are of one point, {cells[0].name}; there is nothing to compare.")
    pairs = pair_up(cells, against or ())
    timings: dict[str, Any] = {}
    if not no_bench:
        from dtfcli.cli import render
        from dtfcli.studies.timing import time_models

        timings = time_models({run.cell.name: run.folder for run in reversed(done)}, render.note)
    return make_report(", ".join(cell.name for cell in cells), done, pairs, timings)


def _different(cells: "Iterable[Cell]") -> "list[Cell]":
    """Each point once, in the order of the study."""
    return list({cell.name: cell for cell in cells}.values())
