"""Shows `dtf eval`: progress while it runs, then a table for one model or for several side by side."""

from typing import TYPE_CHECKING

from dtfcli.cli import render

if TYPE_CHECKING:
    from dtfcli.evaluation.job_runner import EvalEvent
    from dtfcli.evaluation.report import EvalReport, TaskScore
    from dtfcli.evaluation.side_by_side import ScoreDifference

_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "word_perplexity", "loss")


class EvalProgress:
    """What is evaluated, with the time left, and the score of each finished job."""

    def __init__(self, *, several: bool) -> None:
        """`several`: name the model before each job."""
        self._several = several
        self._model = ""
        self._warned: set[str] = set()
        self._steps = render.Steps()
        self._place, self._done, self._count = "", 0, 0

    def __enter__(self) -> "EvalProgress":
        self._steps.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.__exit__()

    def __call__(self, event: "EvalEvent") -> None:
        """Show an event."""
        place = f"{self._model}: {event.message}" if self._several else event.message
        if event.kind == "warning":
            if event.message not in self._warned:  # once for all models
                render.warn(event.message)
            self._warned.add(event.message)
        elif event.kind == "model":
            self._model = event.message
            self._steps(f"Loading {event.message}")
        elif event.kind == "phase":
            self._steps(event.message)
        elif event.kind == "job":
            self._place, self._done, self._count = place, 0, event.count
            self._steps(place)
        elif event.kind == "answers":
            self._done += event.count
            self._steps(self._place, self._done / self._count)
        elif event.scores:
            score = event.scores.get(event.message) or next(iter(event.scores.values()))
            render.note(f"{place}: {_in_short(score)}")


def _in_short(score: "TaskScore") -> str:
    metric = _main_metric(score)
    return f"{metric} {_figure(score, metric)}" if metric else f"{len(score.subtasks)} tasks"


def _main_metric(score: "TaskScore") -> str | None:
    by_name = {metric.partition(",")[0]: metric for metric in reversed(score.metrics)}
    return next((by_name[name] for name in _MAIN_METRICS if name in by_name), next(iter(score.metrics), None))


def _figure(score: "TaskScore", metric: str) -> str:
    figure = score.metrics[metric]
    return _number(figure.value) + ("" if figure.stderr is None else f" ± {_number(figure.stderr)}")


def _number(value: float, sign: str = "") -> str:
    """Four decimals; one decimal for 100 and more."""
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def _top_level(report: "EvalReport") -> list[str]:
    """Names of the results that are not members of another result."""
    members = {member for score in report.results.values() for member in score.subtasks}
    return [name for name in report.results if name not in members]


def _heading(report: "EvalReport") -> str:
    weights = f", weights in {report.quantize}" if report.quantize else ""
    if report.architecture == "dense":
        return f"{report.model}: dense, {report.device} {report.dtype}{weights}"
    causal = "causal" if report.causal else "NOT causal: each token's path depends on later ones"
    share = report.routed_share["overall"] if report.routed_share else None
    routed = f", {share:.0%} of the tokens routed" if share is not None else ""
    how = f"routing {report.routing} ({causal}), γ {report.capacity}{routed}{weights}"
    return f"{report.model}: {report.architecture}, {how}"


def show_report(report: "EvalReport") -> None:
    """Print one model's scores."""
    rows = []
    for name in _top_level(report):
        score = report.results[name]
        of = f" of {score.n_total}" if score.n_total and score.n_total > score.n else ""
        share = f"{score.routed_share['overall']:.2f}" if score.routed_share else ""
        cells = [f"{score.n}{of}", "" if score.shots is None else str(score.shots), share]
        for place, metric in enumerate(score.metrics or [""]):
            figure = _figure(score, metric) if metric else ""
            rows.append([name, metric, figure, *cells] if place == 0 else ["", metric, figure, "", "", ""])
    routed = report.routed_share is not None
    columns = ["task", "metric", "score", "items", "shots", *(["routed"] if routed else [])]
    render.out.print(_heading(report), markup=False, soft_wrap=not render.out.is_terminal)
    render.show_table(columns, [row if routed else row[:-1] for row in rows])
    _show_remarks([report])


def show_side_by_side(reports: list["EvalReport"], differences: list["ScoreDifference"]) -> None:
    """Print the scores of several models, and their differences to the first."""
    letters = [chr(ord("A") + place) for place in range(len(reports))]
    for letter, report in zip(letters, reports, strict=True):
        render.out.print(f"{letter}  {_heading(report)}", markup=False, soft_wrap=not render.out.is_terminal)
    by_score = {(d.model, d.task, d.metric): d for d in differences}
    rows = []
    for name in _top_level(reports[0]):
        for metric in reports[0].results[name].metrics:
            for letter, report in zip(letters, reports, strict=True):
                score = report.results.get(name)
                figure = _figure(score, metric) if score is not None and metric in score.metrics else "–"
                difference = by_score.get((report.model, name, metric))
                first = [name, metric] if report is reports[0] else ["", ""]
                rows.append([*first, letter, figure, "" if difference is None else _difference(difference)])
    render.show_table(["task", "metric", "", "score", "minus A"], rows)
    paired = "A difference's standard error is over the same items"
    unpaired = "; * over different ones" if any(not d.paired for d in differences) else ""
    render.out.print(f"± one standard error. {paired}{unpaired}.", soft_wrap=True)
    _show_remarks(reports)


def _difference(difference: "ScoreDifference") -> str:
    text = _number(difference.value, "+")
    if difference.stderr is not None:
        text += f" ± {_number(difference.stderr)}"
    return text if difference.paired else f"{text}*"


def _show_remarks(reports: list["EvalReport"]) -> None:
    """What limits the figures."""
    for report in reports:
        cut = {name: score.truncated for name, score in report.results.items() if score.truncated}
        if cut:
            tasks = ", ".join(f"{name} {count}" for name, count in cut.items())
            render.note(f"{report.model}: prompts longer than the model's positions lost their beginning ({tasks}).")
        if borrowed := [n for n in _top_level(report) if "excluded" in (report.results[n].fewshot_from or "")]:
            render.note(
                f"{report.model}: {', '.join(borrowed)}: the examples in the prompts are other items of the scored "
                "split, because the data has no other split."
            )
        if not report.causal:
            render.note(f"{report.model}: routing {report.routing} is not causal; generation cannot reach these.")
        for name, reason in report.skipped.items():
            render.note(f"{report.model}: {name} was left out. {reason}")
        for name, score in report.results.items():
            for remark in score.notes:
                render.note(f"{report.model}: {name}: {remark}.")
