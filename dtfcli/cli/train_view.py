"""The display of `dtf train` on stderr: a live panel in a terminal, plain lines elsewhere, a summary at the end."""

import itertools
import math
import shlex
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from dtfcli.cli.render import Lines, Steps, err, left_column, note, warn

if TYPE_CHECKING:
    from dtfcli.cost.accounting import Account
    from dtfcli.settings import Settings
    from dtfcli.training.events import TrainEvent
    from dtfcli.training.loop import TrainResult
    from dtfcli.training.plan import TrainPlan

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 48


class PlainView:
    """A line for each evaluation; in between the latest step or phase, every ten seconds at most."""

    def __init__(self) -> None:
        self._line = "Starting …"
        self._lines = Lines(lambda: self._line)

    def __enter__(self) -> "PlainView":
        self._lines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__()

    def __call__(self, event: "TrainEvent") -> None:
        """Show an event."""
        place, metrics = f"step {event.step}/{event.total_steps}", event.metrics
        if event.kind == "warning":
            warn(event.message)
        elif event.kind == "phase":
            self._line = f"{event.message} …"
        elif event.kind == "start":
            note(_start_line(event))
        elif event.kind == "step" and (rate := metrics.get("tokens_per_second")) is not None:
            self._line = f"{place}  loss {metrics['train/loss']:.4f}  {rate:,.0f} tokens/s"
        elif event.kind == "evaluation":
            shown = (
                ("val/loss", "val", ".4f"),
                ("val/loss_topk", "top-k", ".4f"),
                ("val/routed_share", "routed", ".2f"),
            )
            parts = [f"{label} {metrics[name]:{shape}}" for name, label, shape in shown if name in metrics]
            note("  ".join([place, *parts, f"unigram {metrics['val/unigram']:.4f}"]))


class LiveView:
    """A panel that is redrawn in place: progress, losses, speed, routed share and the curve of the loss."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._phase = Steps()
        self._steps = Progress(
            TextColumn(f"[bold]{name}"),
            BarColumn(None),
            MofNCompleteColumn(),
            left_column(),
            console=err,
            expand=True,
            speed_estimate_period=3600,
        )
        self._steps_task: Any = None
        self._latest: dict[str, float | None] = {}
        self._losses: deque[float] = deque(maxlen=4096)
        self._live = Live(console=err, get_renderable=self._draw, refresh_per_second=4, transient=True)

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: "TrainEvent") -> None:
        """Take an event in; the panel is redrawn four times a second."""
        if event.kind == "warning":
            warn(event.message)
            return
        if event.kind == "start":
            self._steps_task = self._steps.add_task("", total=event.total_steps, completed=event.step)
            note(_start_line(event))
        if event.kind == "phase":
            self._phase(event.message, event.fraction)
        if event.kind == "step":
            self._steps.update(self._steps_task, completed=event.step)
            self._losses.append(event.metrics["train/loss"] or 0.0)
        self._latest |= event.metrics

    def _draw(self) -> Group:
        parts: list[Any] = []
        if self._steps_task is not None:
            parts += [self._steps, self._figures()]
            if len(self._losses) > 1:
                parts.append(Text(sparkline(list(self._losses), _CURVE_WIDTH), style="cyan"))
        return Group(*parts, self._phase.bar)

    def _figures(self) -> Text:
        line = Text()
        for label, name, shape in (
            ("loss", "train/loss", ".3f"),
            ("val", "val/loss", ".3f"),
            ("unigram", "val/unigram", ".3f"),
            ("tokens/s", "tokens_per_second", ",.0f"),
            ("routed", "val/routed_share", ".2f"),
        ):
            if (value := self._latest.get(name)) is not None:
                line.append(f"{label} ", style="dim").append(f"{value:{shape}}   ", style="bold")
        return line


def _start_line(event: "TrainEvent") -> str:
    """How much is trained, and where."""
    if not event.total_steps:
        return f"No training step (training.max_steps = 0); the run folder is {event.message}"
    whole, trained = event.metrics["parameters"] or 0, event.metrics["trainable"] or 0
    again = f", on from step {event.step}" if event.step else ""
    return f"Training {trained:,} of {whole:,} parameters in {event.message}{again}"


def view_of(settings: "Settings") -> PlainView | LiveView:
    """The view for this terminal: live where stderr is one and `logging.live` is on."""
    return LiveView(settings.run.name) if err.is_terminal and settings.logging.live else PlainView()


def sparkline(values: list[float], width: int) -> str:
    """A curve of block characters, `width` wide at most, each the mean of its stretch of values."""
    width = min(width, len(values))
    edges = [len(values) * place // width for place in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def show_summary(result: "TrainResult", settings: "Settings") -> None:
    """Losses, a sample, where things are and the next command, on stderr."""
    metrics, rows = result.metrics, []
    if metrics:
        below = metrics["val/unigram"] - metrics["val/loss"]
        side = "below" if below > 0 else "above"
        rows.append(("validation loss", f"{metrics['val/loss']:.3f}", "nats per token, causal"))
        remark = f"by token frequency alone; the loss is {abs(below):.3f} {side} it"
        rows.append(("unigram", f"{metrics['val/unigram']:.3f}", remark))
        if "val/loss_topk" in metrics:
            rows.append(("with top-k", f"{metrics['val/loss_topk']:.3f}", "the training rule; not causal"))
        rows.append(("bits per byte", f"{metrics['val/bits_per_byte']:.3f}", ""))
        if result.best_step != result.steps and result.best_val_loss is not None:
            rows.append(("best", f"{result.best_val_loss:.3f}", f"at step {result.best_step}, kept as best_model"))
    if "val/routed_share" in metrics:
        shares = [x for name, x in metrics.items() if name.startswith("router/") and name.endswith("/routed_share")]
        remark = f"{min(shares):.2f} to {max(shares):.2f} by layer"
        rows.append(("routed share", f"{metrics['val/routed_share']:.2f}", remark))
    err.print()
    for name, figure, remark in rows:
        err.print(f"{name:<16} [bold]{figure:>6}[/]  [dim]{remark}[/]")
    longest = sorted(result.seconds.items(), key=lambda phase: -phase[1])
    if shown := [f"{name} {seconds:.0f} s" for name, seconds in longest if seconds >= 1]:
        note(f"Time: {', '.join(shown)}")
    note(f"Models, curves.png, settings and metrics: {result.run_dir}")
    if result.evaluation is not None:
        note(f"Benchmarks: {result.evaluation}")
    if result.hub_url is not None:
        note(f"Pushed to {result.hub_url}")
    err.print("\nA sample, its prompt in bold:", style="dim")
    err.print(Text(result.prompt, style="bold").append(result.sample, style="not bold"))
    from dtfcli.runs.folder import MERGED_MODEL

    merged = result.run_dir / MERGED_MODEL
    err.print("\nNext:", style="dim")
    command = next_command(result.run_dir, merged if merged.exists() else result.run_dir, settings)
    err.print(f"  {command}", markup=False, soft_wrap=True)


def next_command(run_dir: Path, model: Path, settings: "Settings") -> str:
    """What to type after a run: of a dense model its conversion, of a routed one what it routes."""
    if settings.model.architecture != "dense":
        return f"dtf inspect-routing {shlex.quote(str(model))}"
    command = f"dtf convert {shlex.quote(str(model))} -o {shlex.quote(str(run_dir / 'routed'))}"
    texts = [source.path for source in settings.data.sources]
    local = [text for text in texts if text == "python-stdlib" or Path(text).exists()]
    return f"{command} --text {shlex.quote(local[0])}" if local else command


def account_rows(
    account: "Account", plan: "TrainPlan | None", settings: "Settings", processes: int = 1
) -> list[tuple[str, str, str]]:
    """The rows of a dry run's account: name, figure, remark."""
    steps, tokens, remark = "–", "–", "follows from the data (training.epochs)"
    if plan:
        steps, tokens, remark = f"{plan.total_steps:,}", _count(plan.total_steps * plan.tokens_per_step), ""
    micro_batches = f"{settings.accumulation_steps(processes)} micro-batches"
    return [
        *_routing_row(account),
        ("parameters", _count(account.parameters), f"{account.parameters:,}"),
        ("new", _count(account.new_parameters), "what routing adds"),
        ("trainable", _count(account.trainable_parameters), f"{account.trainable_parameters:,}"),
        ("FLOPs per token", _count(account.flops_per_token), f"one forward pass at {settings.data.seq_len} tokens"),
        ("share of dense", f"{account.share_of_dense:.3f}", "of those FLOPs"),
        ("memory", f"{account.training_bytes / 2**30:.1f} GiB", "estimate for training on one device"),
        ("tokens per update", f"{settings.tokens_per_update:,}", f"of the optimizer: a step of {micro_batches}"),
        ("steps", steps, remark),
        ("tokens", tokens, "in all" if plan else ""),
    ]


def _routing_row(account: "Account") -> list[tuple[str, str, str]]:
    """γ and the way of choosing; nothing for a dense model."""
    if account.capacity is None:
        return []
    capacity = "by layer" if isinstance(account.capacity, list) else f"{account.capacity:.3g}"
    entities = "layers" if account.way == "layerdrop" else "tokens"
    return [("capacity γ", capacity, f"{entities} are chosen by {account.way}")]


def _count(number: float) -> str:
    """A number in short: 134.5 M."""
    if number < 1000:
        return f"{number:.0f}"
    power = min(4, int(math.log10(number) // 3))
    return f"{number / 1000**power:.1f} {' kMGT'[power]}"
