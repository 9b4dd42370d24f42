"""Draw what `dtf inspect-routing` prints as an SVG, for the README.

python -m tools.routing_picture MODEL docs/images/routing.svg
"""

import sys

from rich.console import Console

from dtfcli.cli import inspect_routing, inspect_view, render
from dtfcli.inspection.statistics import summarize
from dtfcli.inspection.text import inspect_text
from dtfcli.loading.load import load_model, load_tokenizer


def main() -> None:
    """Inspect the sample text and save the picture."""
    model, target = sys.argv[1:]
    render.out = Console(width=92, record=True, force_terminal=True, color_system="truecolor", highlight=False)
    report = inspect_text(load_model(model), load_tokenizer(model), inspect_routing.SAMPLE, python=True)
    inspect_view.show_text(report, summarize(report))
    render.out.save_svg(target, title="dtf inspect-routing outputs/…/quickstart")


if __name__ == "__main__":
    main()
