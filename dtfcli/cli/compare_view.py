"""The tables of `dtf compare`: the plan, what runs at the moment, and the report."""

import time
from types import TracebackType
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
        self._live = Live(console=render.err, refresh_per_second=2, transient=True)

    def __enter__(self) -> "StudyProgress":
        if render.err.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def __call__(self, progress: "Progress") -> None:
        """Take note of what a run does."""
        name = progress.run.settings.run.name
        before = self._runs[name].state
        self._runs[name] = progress
        if self._live.is_started:
            self._live.update(self._table())
        elif progress.state != before:
            render.note(f"{progress.run.cell.name}, seed {progress.run.seed}: {progress.state}")

    def _table(self) -> Any:
        rows, done = [], 0.0
        for at in self._runs.values():
            share = at.step / at.total_steps if at.total_steps else 0.0
            done += (1.0 if at.state in ("finished", "reused") else share) / len(self._runs)
            steps = f"{at.step}/{at.total_steps}" if at.total_steps else ""
            rows.append([at.run.cell.name, at.run.seed, at.state, steps, "" if at.loss is None else f"{at.loss:.3f}"])
        left = (time.monotonic() - self._started) * (1 - done) / done if done else None
        title = "study" if left is None else f"study, about {left / 60:.0f} min left"
        return render.table(["point", "seed", "", "step", "loss"], rows, title=title)


def show_jobs(states: "list[Progress]", json: bool) -> None:
    """Print how far the runs of a study are that train as jobs."""
    entries = [
        {
            "point": at.run.cell.name,
            "seed": at.run.seed,
            "run": at.run.settings.run.name,
            "state": "finished" if at.state == "reused" else at.state,
            "step": at.step,
            "total_steps": at.total_steps,
            "loss": at.loss,
        }
        for at in states
    ]
    if json:
        render.emit_json({"runs": entries})
        return
    rows = [
        [
            e["point"],
            e["seed"],
            e["state"],
            f"{e['step']}/{e['total_steps']}" if e["step"] else "",
            "" if e["loss"] is None else f"{e['loss']:.3f}",
        ]
        for e in entries
    ]
    render.out.print(render.table(["point", "seed", "", "step", "loss"], rows, title=f"{len(entries)} runs"))


def show_plan(runs: "list[PlannedRun]", json: bool) -> None:
    """Print what the study would run, as a table or as JSON."""
    from dtfcli.experiment import preview
    from dtfcli.studies.execute import is_finished

    entries, flops = list[dict[str, Any]](), 0.0
    for run in runs:
        seen, finished = preview(run.settings), is_finished(run)
        steps = seen.plan.total_steps if seen.plan is not None else run.settings.training.max_steps or 0
        tokens = steps * run.settings.tokens_per_update
        # Final and best model, and two checkpoints with AdamW's moments, all in float32.
        size = seen.account.parameters * 4 * (2 + 2 * 3)
        flops += 0.0 if finished else 3.0 * tokens * seen.account.flops_per_token
        own = {"point": run.cell.name, "seed": run.seed, "run": run.settings.run.name}
        entries.append({**own, "tokens": tokens, "bytes": size, "finished": finished})
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
    render.out.print(render.table(["point", "seed", "run", "tokens", "MiB", ""], rows, title=f"{len(runs)} runs"))
    render.out.print(f"to train: {tokens:,} tokens, about {minutes:.0f} min, {size / 2**20:,.0f} MiB")


def _rate() -> float:
    """FLOP/s that training reaches here: half of a large matrix product's."""
    import torch

    from dtfcli.cost.peak import matmul_peak

    return 0.5 * (matmul_peak(torch.device("cpu"), torch.float32) or 1e11)


def show_report(report: "StudyReport") -> None:
    """Print the points, who routes the same tokens, then what follows."""
    from dtfcli.studies.report import AGREEMENT_LEGEND, COLUMNS, LEGEND

    render.out.print(render.table(COLUMNS, [row.cells for row in report.rows], title="study"))
    render.out.print(LEGEND, style="dim")
    heads, rows = report.agreement_table()
    if rows:
        render.out.print(render.table(heads, rows, title="who is routed"))
        render.out.print(AGREEMENT_LEGEND, style="dim")
    for difference in report.differences:
        render.out.print(difference.sentence)
