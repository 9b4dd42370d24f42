"""`dtf compare`: the same training at every point of a grid, and what differs, with error bars."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError

if TYPE_CHECKING:
    from dtfcli.studies.grid import PlannedRun
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
    str | None,
    typer.Option(
        "--against",
        metavar="POINT",
        help="Control of the differences. Default: random, else dense.",
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
    runs: "list[PlannedRun]", parallel: int, against: str | None, no_bench: bool, output: Path
) -> "StudyReport":
    from dtfcli.cli import compare_view
    from dtfcli.studies.execute import execute
    from dtfcli.studies.measure import measure
    from dtfcli.studies.report import Finished

    if against is not None:
        _check_control(against, [run.cell.name for run in runs])
    with compare_view.StudyProgress(runs) as show:
        folders = execute(runs, parallel, show)
    done = []
    for run in runs:
        folder = folders[run.settings.run.name]
        done.append(Finished(run.cell.name, run.seed, folder, measure(folder)))
    title = f"{', '.join(dict.fromkeys(run.cell.name for run in runs))}"
    return _report(title, done, against, no_bench)


def _report_on(folders: list[Path], against: str | None, no_bench: bool) -> "StudyReport":
    from dtfcli.studies.existing import finished_runs

    done = finished_runs(folders)
    return _report(", ".join(dict.fromkeys(run.cell for run in done)), done, against, no_bench)


def _report(title: str, done: "list[Finished]", against: str | None, no_bench: bool) -> "StudyReport":
    from dtfcli.studies.report import default_control, make_report

    cells = list(dict.fromkeys(run.cell for run in done))
    control = against or default_control(cells)
    _check_control(control, cells)
    timings: dict[str, Any] = {}
    if not no_bench:
        from dtfcli.cli import render
        from dtfcli.studies.timing import time_models

        timings = time_models({run.cell: run.folder for run in reversed(done)}, render.note)
    return make_report(title, done, control, timings)


def _check_control(control: str, cells: list[str]) -> None:
    if control not in cells:
        raise ConfigError(
            f"--against {control}: not a point of this study; choose from {', '.join(dict.fromkeys(cells))}."
        )
