"""The tables of `dtf compare`: the plan, the progress of its runs, and the report."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dtfcli.cli import render

if TYPE_CHECKING:
    from dtfcli.studies.execute import Progress
    from dtfcli.studies.grid import PlannedRun
    from dtfcli.studies.report import StudyReport


class StudyProgress:
    """One live table for all runs of a study."""

    def __init__(self, runs: "list[PlannedRun]") -> None:
        """Show nothing yet."""
        from rich.live import Live

        from dtfcli.studies.execute import Progress

        self._runs: dict[str, Progress] = {run.settings.run.name: Progress(run, "waiting") for run in runs}
        self._started = time.monotonic()
        self._live = Live(console=render.err, get_renderable=self._table, refresh_per_second=2, transient=True)
        self._lines = render.Lines(self._line)

    def __enter__(self) -> "StudyProgress":
        if render.err.is_terminal:
            self._live.start()
        self._lines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__()
        self._live.stop()

    def __call__(self, progress: "Progress") -> None:
        """Take the progress of a run; what became of it has a line of its own where there is no table."""
        name = progress.run.settings.run.name
        before, self._runs[name] = self._runs[name].state, progress
        if progress.state != before and not render.err.is_terminal:
            render.note(f"{progress.run.point.name}, seed {progress.run.seed}: {progress.state}")

    def _table(self) -> Any:
        return _states(self._line(), self._runs.values())

    def _line(self) -> str:
        done = sum(run.state in ("finished", "reused") for run in self._runs.values())
        share = sum(
            1.0 if run.state in ("finished", "reused") else run.step / run.total_steps if run.total_steps else 0.0
            for run in self._runs.values()
        ) / len(self._runs)
        left = (time.monotonic() - self._started) * (1 - share) / share if share else None
        return f"{done} of {len(self._runs)} runs finished  {render.left(left)}".rstrip()


def _entry(progress: "Progress") -> dict[str, Any]:
    return {
        "point": progress.run.point.name,
        "seed": progress.run.seed,
        "run": progress.run.settings.run.name,
        "state": "finished" if progress.state == "reused" else progress.state,
        "step": progress.step,
        "total_steps": progress.total_steps,
        "loss": progress.loss,
    }


def _states(title: str, runs: "Iterable[Progress]") -> Any:
    """A table of runs and their progress."""
    rows = []
    for entry in map(_entry, runs):
        step = f"{entry['step']}/{entry['total_steps']}" if entry["step"] else ""
        loss = "" if entry["loss"] is None else f"{entry['loss']:.3f}"
        rows.append([entry["point"], entry["seed"], entry["state"], step, loss])
    return render.table(["point", "seed", "", "step", "loss"], rows, title=title)


def show_jobs(runs: "list[Progress]", json: bool) -> None:
    """Print the progress of the runs of a study that train as jobs."""
    if json:
        render.emit_json({"runs": [_entry(run) for run in runs]})
    else:
        render.out.print(_states(f"{len(runs)} runs", runs))


def show_plan(runs: "list[PlannedRun]", json: bool) -> None:
    """Print what the study would run, as a table or as JSON."""
    from dtfcli.experiment import preview
    from dtfcli.studies.execute import is_finished

    entries, flops = list[dict[str, Any]](), 0.0
    for run in runs:
        expected, finished = preview(run.settings), is_finished(run)
        steps = expected.plan.total_steps if expected.plan is not None else run.settings.training.max_steps or 0
        tokens = steps * run.settings.tokens_per_update
        # Final and best model, and two checkpoints with AdamW's moments, all in float32.
        size = expected.account.parameters * 4 * (2 + 2 * 3)
        flops += 0.0 if finished else 3.0 * tokens * expected.account.flops_per_token
        name = {"point": run.point.name, "seed": run.seed, "run": run.settings.run.name}
        entries.append({**name, "tokens": tokens, "bytes": size, "finished": finished})
    missing = [entry for entry in entries if not entry["finished"]]
    tokens, size = (sum(entry[name] for entry in missing) for name in ("tokens", "bytes"))
    minutes = flops / _rate() / 60
    if json:
        render.emit_json({"runs": entries, "tokens": tokens, "bytes": size, "minutes": minutes})
        return
    rows = [
        [e["point"], e["seed"], e["run"], f"{e['tokens']:,}", f"{e['bytes'] / 2**20:,.0f}", "finished" * e["finished"]]
        for e in entries
    ]
    render.show_table(["point", "seed", "run", "tokens", "MiB", ""], rows, title=f"{len(runs)} runs")
    render.out.print(f"to train: {tokens:,} tokens, about {minutes:.0f} min, {size / 2**20:,.0f} MiB")


def _rate() -> float:
    """FLOP/s that training reaches here: half of a large matrix product's."""
    import torch

    from dtfcli.cost.peak import matmul_peak

    return 0.5 * (matmul_peak(torch.device("cpu"), torch.float32) or 1e11)


def show_report(report: "StudyReport") -> None:
    """Print the points, who routes the same tokens, then what follows."""
    from dtfcli.studies.report import AGREEMENT_LEGEND, COLUMNS, LEGEND

    render.show_table(COLUMNS, [row.cells for row in report.rows], title="study")
    render.out.print(LEGEND, style="dim")
    heads, rows = report.agreement_table()
    if rows:
        render.show_table(heads, rows, title="who is routed")
        render.out.print(AGREEMENT_LEGEND, style="dim")
    for difference in report.differences:
        render.out.print(difference.sentence)
