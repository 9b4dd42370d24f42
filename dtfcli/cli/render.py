"""What the commands print: results on stdout, everything else on stderr.

The consoles respect NO_COLOR, COLUMNS and pipes (rich sees to it). Results that other programs read go through
`emit` and `emit_json`, which never wrap, color or interpret them.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.table import Table

from dtfcli.errors import plain

_LINE_EVERY_SECONDS = 10.0

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def emit(text: str) -> None:
    """Write one result to stdout as it is."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def write(piece: str) -> None:
    """Write a piece of text to stdout at once, without a line end."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def emit_json(document: Any) -> None:
    """Write one JSON document to stdout: dataclasses and paths become plain, NaN and infinity null."""
    emit(json.dumps(plain(document), ensure_ascii=False, indent=2))


def note(text: str) -> None:
    """A remark on stderr, dimmed; brackets are text, not markup."""
    err.print(_wrapped(text), style="dim", markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Warn on stderr."""
    err.print(_wrapped(f"Warning: {text}"), style="yellow", markup=False, soft_wrap=True)


def _wrapped(text: str) -> str:
    """Broken between words in a terminal; elsewhere a line stays one."""
    if not err.is_terminal:
        return text
    return "\n".join(fill(line, err.width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))


def fail(text: str) -> None:
    """Say what went wrong on stderr, "Error:" in front; a line is never broken."""
    err.print("[bold red]Error:[/] ", end="")
    err.print(text, markup=False, soft_wrap=True)


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], *, title: str | None = None) -> Table:
    """A plain table; its last column takes the room that is left."""
    drawn = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    names = list(columns)
    for name in names:
        drawn.add_column(name, overflow="fold", no_wrap=name is not names[-1])
    for row in rows:
        drawn.add_row(*[str(cell) for cell in row])
    return drawn


def show_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    """Print a table to stdout; one that is wider than the terminal is not cut, but its lines run on."""
    drawn = table(columns, rows, title=title)
    needed = drawn.__rich_measure__(out, out.options.update(width=10_000)).minimum
    drawn.width = needed if needed > out.width else None
    out.print(drawn, crop=False)


def write_json(document: Any, path: Path) -> None:
    """As `emit_json`, to a file."""
    path.write_text(json.dumps(plain(document), ensure_ascii=False, indent=2) + "\n", "utf-8")


class Lines:
    """Where stderr is no terminal: what is going on, a line every ten seconds at most."""

    def __init__(self, text: Callable[[], str]) -> None:
        """`text`: says what is going on; "": nothing."""
        self._text, self._done = text, threading.Event()

    def __enter__(self) -> None:
        if not err.is_terminal:
            threading.Thread(target=self._write, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _write(self) -> None:
        written = ""
        while not self._done.wait(_LINE_EVERY_SECONDS):
            if (text := self._text()) and text != written:
                note(text)
            written = text


class Steps:
    """What is going on: one bar with the time left, which a terminal shows; elsewhere a line now and then."""

    def __init__(self, first: str = "Starting") -> None:
        """`first`: the step that goes on until another one is reported."""
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24), left_column())
        # A step of the work may take minutes: all of them tell the speed.
        self.bar = Progress(
            *columns, console=err, disable=not err.is_terminal, transient=True, speed_estimate_period=3600
        )
        self._task = self.bar.add_task(first, total=None)
        self._lines = Lines(self._line)

    def __enter__(self) -> "Steps":
        self.bar.start()
        self._lines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__()
        if not self.bar.disable:  # rich 13.9 would print an empty line
            self.bar.stop()

    def __call__(self, message: str, share: float | None = None) -> None:
        """Show a step and the share of it that is done, if that is known."""
        task = self.bar.tasks[0]
        if message != task.description or share is None or share < task.completed:
            self.bar.reset(self._task, total=None, description=message)
        if share is not None:
            self.bar.update(self._task, total=1.0, completed=share)

    def _line(self) -> str:
        task = self.bar.tasks[0]
        share = f" {task.completed:.0%} {left(task.time_remaining)}" if task.completed else " …"
        return (task.description + share).rstrip()


def left(seconds: float | None) -> str:
    """The time left, as 1:05 left or 2:01:05 left; nothing where it is not known."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def left_column() -> Any:
    """A bar's column of the time left."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(left(task.time_remaining) if task.total and not task.finished else "")

    return Left()
