"""The page: complete in itself, and no text can get out of its place."""

import base64
import hashlib
import json
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dtfcli.inspection.corpus import Corpus, inspect_corpus
from dtfcli.inspection.figure import draw_figure
from dtfcli.inspection.page import page_data, render_page
from dtfcli.inspection.palette import SEQUENTIAL, luminance, readable_on, shades
from dtfcli.inspection.statistics import summarize
from dtfcli.inspection.text import inspect_text
from dtfcli.models.conversion import convert
from tests.inspection.conftest import TEXT
from tests.tiny import dense_model, routed_model, tokens

HOSTILE = [
    "<script>alert(1)</script> <!-- <script> --> </script><img src=x onerror=alert(1)>",
    "\" onload='x' & &lt; %%data%% \x00\x07\x1b[31m \u2028\u2029 \u202eright to left שלום",
    "👩‍👩‍👧 \ufffd x\ud800y $\\frac{1}{2}$ $",
]


class _Page(HTMLParser):
    """Collects the elements of a page and the content of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.inside[-1] += data


@pytest.fixture(scope="module")
def model_of_bytes() -> Any:
    model: Any = convert(dense_model(vocab_size=300), "dtf", 0.5)
    model.calibrate([{"input_ids": tokens(16, 64)}], ())
    return model


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_stays_text(model_of_bytes: Any, byte_level: Any, text: str, tmp_path: Path) -> None:
    report = inspect_text(model_of_bytes, byte_level, text, name=text.replace("\ud800", ""))
    summary = summarize(report)
    page = render_page(report, summary)
    page.encode()
    parsed = _Page(page)
    tags = [tag for tag, _ in parsed.tags]
    assert (tags.count("script"), tags.count("style"), tags.count("img")) == (2, 1, 0)
    style, data, script = parsed.inside
    assert json.loads(data) == json.loads(json.dumps(page_data(report, summary)))
    assert "".join(json.loads(data)["text"]["pieces"]) == report.source.text
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'")
    for part in (style, script):
        assert base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() in policy
    links = [value or "" for _, given in parsed.tags for name, value in given.items() if name in ("src", "href")]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in style
    assert "innerHTML" not in script
    draw_figure(report, summary, tmp_path / "figure.png")


def test_the_page_of_a_corpus(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": TEXT}))
    corpus = inspect_corpus(routed_model(), words, Corpus(file))
    data = page_data(corpus, corpus.summary)
    assert "text" not in data
    assert "texts.jsonl" in render_page(corpus, corpus.summary)
    draw_figure(corpus, corpus.summary, tmp_path / "figure.png")
    width, height = struct.unpack(">II", (tmp_path / "figure.png").read_bytes()[16:24])
    assert width == 1800
    assert height > 400


@pytest.mark.parametrize("ramp", SEQUENTIAL)
def test_text_is_readable_on_every_shade(ramp: tuple[str, ...]) -> None:
    """At WCAG's contrast of 4.5 and more."""
    for shade in shades(ramp):
        dark, light = sorted((luminance(shade), luminance(readable_on(shade))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_depth_goes_one_way_in_lightness() -> None:
    for ramp, falling in zip(SEQUENTIAL, (True, False), strict=True):
        light = [luminance(shade) for shade in shades(ramp)]
        assert light == sorted(light, reverse=falling)
