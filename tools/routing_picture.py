"""Draw what `dtf inspect-routing` prints as an SVG, for the README.

python -m tools.routing_picture MODEL FILE docs/images/routing.svg

FILE holds the text. The README's is the first paragraph of a novel, and its model the adapted one of docs/results.md.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dtfcli.cli import inspect_view, render
from dtfcli.inspection.statistics import summarize
from dtfcli.inspection.text import inspect_text
from dtfcli.loading.load import load_model, load_tokenizer

LAST = "Frequency"
"""Title of the first table that the picture leaves out."""


def main() -> None:
    """Inspect the text and save the picture."""
    model, file, target = sys.argv[1:]
    render.out = Console(width=92, record=True, force_terminal=True, color_system="truecolor", highlight=False)
    text = Path(file).read_text("utf-8").strip()
    report = inspect_text(load_model(model), load_tokenizer(model), text)
    inspect_view.show(report, summarize(report))
    text, _, _ = render.out.export_text(styles=True).partition(LAST)
    picture = Console(width=92, record=True, force_terminal=True, color_system="truecolor", highlight=False)
    picture.print(Text.from_ansi(text.rstrip()))
    picture.save_svg(target, title=f"dtf inspect-routing {Path(model).name} --file {Path(file).name}")


if __name__ == "__main__":
    main()
