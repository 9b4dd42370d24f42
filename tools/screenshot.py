"""Draw what a command prints as an SVG.

python -m tools.screenshot docs/images/convert.svg -- dtf convert MODEL -o routed --text novels.parquet
python -m tools.screenshot docs/images/routing.svg --until Frequency -- dtf inspect-routing MODEL --file FILE

--until leaves out everything from the first line that begins so. Progress and notes, on stderr, are no part of it.
"""

import argparse
import os
import shlex
import subprocess
import sys
from itertools import takewhile
from textwrap import shorten

from rich.console import Console
from rich.text import Text

_COLORS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}


def main() -> None:
    """Run the command and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--width", type=int, default=92)
    parser.add_argument("--until", default="")
    parser.add_argument("command", nargs="+")
    chosen = parser.parse_args()
    environment = os.environ | _COLORS | {"COLUMNS": str(chosen.width)}
    command = [sys.executable, "-m", "dtfcli", *chosen.command[1:]]
    printed = subprocess.run(command, stdout=subprocess.PIPE, env=environment, encoding="utf-8", check=True).stdout
    lines = Text.from_ansi(printed.rstrip()).split("\n")
    shown = takewhile(lambda line: not (chosen.until and line.plain.startswith(chosen.until)), lines)
    picture = Console(width=chosen.width, record=True, force_terminal=True, color_system="truecolor", highlight=False)
    picture.print(Text("\n").join(shown))
    picture.save_svg(chosen.target, title=shorten(shlex.join(chosen.command), chosen.width - 20, placeholder=" …"))


if __name__ == "__main__":
    main()
