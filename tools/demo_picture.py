"""The picture of docs/serving.md: what `dtf demo` shows, by Chromium without a window.

dtf demo MODEL --port 7861 &
python -m tools.demo_picture http://localhost:7861 docs/images/demo.png
"""

import shutil
import sys

from playwright.sync_api import sync_playwright

PROMPT = "The keeper of the lighthouse climbed the stairs, and"


def main(url: str, picture: str) -> None:
    """Write a continuation next to the dense model's, and keep the page as a PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 600})
        page.goto(url)
        page.get_by_label("beside it").check()
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        page.get_by_label("Prompt", exact=True).press("Enter")
        page.locator(".answer.done:nth-child(2)").wait_for(timeout=300_000)
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
