"""`dtf compare`: the same training at every point of a grid, and what differs, with error bars."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError

if TYPE_CHECKING:
    from dtfcli.studies.grid import PlannedRun, Point
    from dtfcli.studies.measure import Finished
    from dtfcli.studies.report import StudyReport

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PRESET] [KEY=VALUE]...",
        help="A preset, then settings of all runs. A point that does not read one goes without it.",
        autocompletion=options.complete_preset_or_setting,
    ),
]
Vary = Annotated[
    list[str] | None,
    typer.Option("--vary", metavar="KEY=A,B,…", help="An axis of the grid; may be given several times."),
]
PointOption = Annotated[
    list[str] | None,
    typer.Option(
        "--point",
        metavar="'NAME: KEY=VALUE …'",
        help="A point by itself, instead of axes; give several. The first is the control, unless --against says "
        "otherwise.",
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="N|A,B,…", help="Seeds of each point: their number, or a list. Default: 3."),
]
Plan = Annotated[bool, typer.Option("--plan", help="Show the runs, their tokens, time and disk, and stop.")]
Parallel = Annotated[int | None, typer.Option("--parallel", min=1, help="Runs at once. Default: 1; all on a cluster.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="slurm|local",
        help="Submit the runs as jobs and leave; the same command asks again, and reports when all are finished. "
        "local: processes of this machine.",
    ),
]
ClusterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cluster-option",
        metavar="KEY=VALUE",
        help="partition, account, qos, constraint, gpus (of a run), cpus, memory (GB), time (H:MM:SS).",
    ),
]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of the runs and of the report.")]
Against = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="POINT",
        help="Control of the differences: a point's name, or one value of an axis: with random, each point is compared "
        "with the random point whose other settings are the same. May be given several times. Default: random, else "
        "dense.",
    ),
]
From = Annotated[
    list[Path] | None, typer.Option("--from", metavar="RUN", help="Report on runs that exist, instead of a grid.")
]
NoBench = Annotated[bool, typer.Option("--no-bench", help="Do not measure the time of the trained models.")]


def compare(
    arguments: Arguments = None,
    vary: Vary = None,
    point: PointOption = None,
    seeds: Seeds = None,
    plan: Plan = False,
    parallel: Parallel = None,
    cluster: Cluster = None,
    cluster_option: ClusterOption = None,
    output: Output = Path("study"),
    against: Against = None,
    from_runs: From = None,
    no_bench: NoBench = False,
    json: options.Json = False,
) -> None:
    """Train a grid of runs on equal terms and report what differs: is routing worth it, and whose?

    Runs of one seed share the initial backbone, the order of the data and what is held out. Start the command again
    to go on after a stop, or to ask a cluster; finished runs are reused. The last line on stdout is the page with the
    report.

    \b
    Examples:
      dtf compare quickstart --vary model=dtf,mod,random,layerdrop,dense --seeds 2
      dtf compare quickstart --vary model=dtf,mod --vary model.capacity=0.25,0.5
      dtf compare quickstart --point 'a: model=dense' --point 'b: model=mod'
      dtf compare --from outputs/2026-01-31/dtf-1 --from outputs/2026-01-31/mod-1
      dtf compare dtf-qwen2.5-0.5b --vary model=dtf,mod --cluster slurm
    """
    from dtfcli.cli import compare_view, render
    from dtfcli.studies.cluster import parse_options
    from dtfcli.studies.measure import finished_runs
    from dtfcli.studies.pairs import pair_up
    from dtfcli.studies.write import write_report

    if from_runs:
        if vary or point or arguments or cluster or cluster_option or plan or parallel or seeds:
            raise ConfigError(
                "--from: reports on runs that exist; leave PRESET, settings, --vary, --point, --seeds, --plan, "
                "--parallel and --cluster out."
            )
        report = _report(finished_runs(from_runs), against, no_bench)
        output.mkdir(parents=True, exist_ok=True)
    else:
        job_options = parse_options(cluster, cluster_option or [])
        runs = _planned(arguments, vary, point, seeds or "3", output)
        pair_up(_different(run.point for run in runs), against or ())
        if plan:
            compare_view.show_plan(runs, json)
            return
        if not _trained(runs, parallel, cluster, job_options, output, json):
            return
        report = _report(_measured(runs), against, no_bench)
    files = write_report(report, output)
    if json:
        render.emit_json(report.to_dict())
        return
    compare_view.show_report(report)
    render.emit(str(files[-1]))


def _planned(
    arguments: list[str] | None, vary: list[str] | None, points: list[str] | None, seeds: str, output: Path
) -> "list[PlannedRun]":
    from dtfcli.settings import sources
    from dtfcli.studies.grid import parse_axes, parse_points, parse_seeds, plan_grid, plan_points

    preset, overrides = options.split_preset(arguments)
    if preset is None:
        raise ConfigError("PRESET: name one, such as quickstart: all runs of a study start from the same settings.")
    sources.read_preset(preset)
    if points:
        if vary:
            raise ConfigError("--point: names points one by one and --vary spans a grid; choose one of the two.")
        return plan_points(preset, parse_points(points), parse_seeds(seeds), overrides, output)
    return plan_grid(preset, parse_axes(vary or []), parse_seeds(seeds), overrides, output)


def _trained(
    runs: "list[PlannedRun]",
    parallel: int | None,
    cluster: str | None,
    job_options: dict[str, Any],
    output: Path,
    json: bool,
) -> bool:
    """Train the missing runs here, or submit them to a cluster; returns whether all runs are finished."""
    from dtfcli.cli import compare_view, render

    if cluster is None:
        from dtfcli.studies.execute import execute

        with compare_view.StudyProgress(runs) as show:
            execute(runs, parallel or 1, show)
        return True
    from dtfcli.studies.cluster import submit

    states = submit(runs, cluster, job_options, output, parallel)
    if all(state.state == "reused" for state in states):
        return True
    compare_view.show_jobs(states, json)
    render.note("Start the same command again to see their progress; it reports when all are finished.")
    return False


def _measured(runs: "list[PlannedRun]") -> "list[Finished]":
    from dtfcli.cli import render
    from dtfcli.studies.execute import folder_of
    from dtfcli.studies.measure import Finished, measure

    found = [(run, folder) for run in runs if (folder := folder_of(run.settings)) is not None]
    finished = []
    with render.Steps() as show:
        for count, (run, folder) in enumerate(found):
            show("Measuring losses", count / len(found))
            finished.append(Finished(run.point, run.seed, folder, measure(folder)))
    return finished


def _report(runs: "list[Finished]", against: list[str] | None, no_bench: bool) -> "StudyReport":
    from dtfcli.studies.pairs import pair_up
    from dtfcli.studies.report import make_report

    points = _different(run.point for run in runs)
    if len(points) < 2:
        raise ConfigError(f"--from: all runs are of one point, {points[0].name}; there is nothing to compare.")
    pairs = pair_up(points, against or ())
    timings: dict[str, Any] = {}
    if not no_bench:
        from dtfcli.cli import render
        from dtfcli.studies.timing import time_models

        with render.Steps() as show:
            timings = time_models({run.point.name: run.folder for run in reversed(runs)}, show)
        for point in points:
            if point.name not in timings:
                render.note(f"{point.name}: its time is not measured, since each layer has a capacity of its own")
    return make_report(", ".join(point.name for point in points), runs, pairs, timings)


def _different(points: "Iterable[Point]") -> "list[Point]":
    """Each point once, in the order of the study."""
    return list({point.name: point for point in points}.values())
