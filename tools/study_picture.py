"""Draw the loss of a study's models against their FLOPs as an SVG, for the README.

python -m tools.study_picture docs/results/small-study.json docs/images/small-study.svg
"""

import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from dtfcli.studies.figure import draw_pareto, styles_of
from dtfcli.studies.report import Row


def main() -> None:
    """Read a report and draw it."""
    source, target = map(Path, sys.argv[1:])
    rows = [Row(**row | {"timing": None}) for row in json.loads(source.read_text("utf-8"))["rows"]]
    with rc_context({"svg.hashsalt": "dtf", "svg.fonttype": "path"}):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axis = figure.subplots()
        draw_pareto(
            axis,
            rows,
            styles_of(row.name for row in rows),
            "FLOPs of a forward pass / dense",
            lambda row: row.flop_ratio,
        )
        axis.legend(fontsize=8, ncols=2, frameon=False, loc="upper right")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        figure.savefig(target, metadata={"Date": None})
    lines = [line.rstrip() for line in target.read_text("utf-8").splitlines()]
    target.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
