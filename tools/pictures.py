"""The pictures in README and docs: what a command prints, the figure and the page of `dtf inspect-routing`, `dtf demo`.

python -m tools.pictures terminal docs/images/convert.svg -- dtf convert MODEL -o routed --text novels.parquet
python -m tools.pictures terminal docs/images/routing.svg --until Layers -- dtf inspect-routing MODEL --file FILE
python -m tools.pictures inspect MODEL FILE
python -m tools.pictures demo MODEL

--until leaves out everything from the first line that begins so. Progress and notes, on stderr, are no part of it.
Chromium takes the pictures of pages.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PROMPT = "The keeper of the lighthouse climbed the stairs, and"
URL = "http://localhost:7861"
DTF = (sys.executable, "-m", "dtfcli")
_COLORS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pictures = parser.add_subparsers(required=True)
    terminal = pictures.add_parser("terminal")
    terminal.add_argument("target")
    terminal.add_argument("--width", type=int, default=92)
    terminal.add_argument("--until", default="")
    terminal.add_argument("command", nargs="+")
    terminal.set_defaults(draw=draw_terminal)
    inspect = pictures.add_parser("inspect")
    inspect.add_argument("model")
    inspect.add_argument("file")
    inspect.set_defaults(draw=draw_inspect)
    demo = pictures.add_parser("demo")
    demo.add_argument("model")
    demo.set_defaults(draw=draw_demo)
    chosen = vars(parser.parse_args())
    chosen.pop("draw")(**chosen)


def draw_terminal(target: str, width: int, until: str, command: list[str]) -> None:
    """Run a command of dtf and save what it prints as an SVG."""
    environment = os.environ | _COLORS | {"COLUMNS": str(width)}
    run = [*DTF, *command[1:]]
    printed = subprocess.run(run, stdout=subprocess.PIPE, env=environment, encoding="utf-8", check=True).stdout
    lines = Text.from_ansi(printed.rstrip()).split("\n")
    shown = takewhile(lambda line: not (until and line.plain.startswith(until)), lines)
    picture = Console(width=width, record=True, force_terminal=True, color_system="truecolor", highlight=False)
    picture.print(Text("\n").join(shown))
    picture.save_svg(target, title=shorten(shlex.join(command), width - 20, placeholder=" …"))


def draw_inspect(model: str, file: str) -> None:
    """The figure and the page of a text."""
    with TemporaryDirectory() as folder, browser_page(height=800) as shot:
        page, figure = Path(folder) / "page.html", Path(folder) / "inspect.png"
        outputs = ["--file", file, "--html", str(page), "--png", str(figure)]
        subprocess.run([*DTF, "inspect-routing", model, *outputs], check=True, stdout=subprocess.DEVNULL)
        shutil.move(figure, IMAGES / figure.name)
        shot.goto(page.as_uri())
        shot.locator(".t").nth(12).hover()
        shot.screenshot(path=IMAGES / "inspect-page.png")


def draw_demo(model: str) -> None:
    """A continuation next to the dense model's."""
    command = [*DTF, "demo", model, "--port", URL.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urlopen(URL).close()
                break
            except URLError:
                time.sleep(0.2)
        with browser_page(height=600) as page:
            page.goto(URL)
            page.get_by_label("beside it").check()
            page.get_by_label("Prompt", exact=True).fill(PROMPT)
            page.get_by_label("Prompt", exact=True).press("Enter")
            page.locator(".answer.done:nth-child(2)").wait_for(timeout=300_000)
            page.screenshot(path=IMAGES / "demo.png")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browser_page(height: int) -> Iterator[Any]:
    """A page of Chromium, closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1200, "height": height})
        browser.close()


if __name__ == "__main__":
    main()
