"""The pictures of one model in README and docs: the figure and the page of `dtf inspect-routing`, and `dtf demo`.

python -m tools.pictures MODEL FILE

FILE holds the text; that of the docs is the beginning of a novel. Chromium takes the pictures of pages.
`tools.screenshot` draws what the terminal shows.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PROMPT = "The keeper of the lighthouse climbed the stairs, and"
URL = "http://localhost:7861"


def main(model: str, file: str) -> None:
    """Make all of them."""
    page = IMAGES.parent / "inspect.html"
    dtf = [sys.executable, "-m", "dtfcli"]
    subprocess.run(
        [*dtf, "inspect-routing", model, "--file", file, "--html", page, "--png", IMAGES / "inspect.png"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            shot: Any = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme=scheme)
            shot.goto(page.as_uri())
            shot.locator(".t").nth(12).hover()
            shot.screenshot(path=IMAGES / f"inspect-page-{scheme}.png")
        with demo([*dtf, "demo", model, "--port", URL.rpartition(":")[2]]):
            draw_demo(browser.new_page(viewport={"width": 1200, "height": 600}))
        browser.close()
    page.unlink()


@contextmanager
def demo(command: list[str]) -> Iterator[None]:
    """`dtf demo` runs inside of a `with` block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urlopen(URL).close()
                break
            except URLError:
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def draw_demo(page: Any) -> None:
    """A continuation next to the dense model's."""
    page.goto(URL)
    page.get_by_label("beside it").check()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.locator(".answer.done:nth-child(2)").wait_for(timeout=300_000)
    page.screenshot(path=IMAGES / "demo.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
