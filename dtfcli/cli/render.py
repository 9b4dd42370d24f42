"""What the commands print: results on stdout, everything else on stderr.

The consoles respect NO_COLOR, COLUMNS and pipes (rich sees to it). Results that other programs read go through
`emit` and `emit_json`, which never wrap, color or interpret them.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from dtfcli.errors import plain

T = TypeVar("T")

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
    err.print(text, style="dim", markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Warn on stderr."""
    err.print(f"Warning: {text}", style="yellow", markup=False, soft_wrap=True)


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


def write_json(document: Any, path: Path) -> None:
    """As `emit_json`, to a file."""
    path.write_text(json.dumps(plain(document), ensure_ascii=False, indent=2) + "\n", "utf-8")


def track(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """The items, with a progress bar on stderr if that is a terminal."""
    from rich.progress import track as rich_track

    yield from rich_track(items, description, total=total, console=err, disable=not err.is_terminal, transient=True)
