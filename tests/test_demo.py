"""`dtf demo`: what an answer says of itself, and the page in a real browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dtfcli
from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.demo import page as demo_page
from dtfcli.demo.answers import Answer
from dtfcli.demo.page import Demo, Turns, draw
from dtfcli.errors import ConfigError
from dtfcli.generation import Sampling, generate
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.shares import measured_shares
from tests.conftest import Outcome
from tests.tiny import dense_model, routed_model, tokens, word_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT, LENGTH = "a b c w5 w6", 24
POSITIONS = 4096
"""Enough for an answer that is still written when somebody presses Stop."""
SECONDS = 60
"""Until the page must be there: importing takes most of it, on a machine that is busy."""


def with_routed_mlps(positions: int = 512) -> Any:
    model = dtfcli.route_mlps(dense_model(max_position_embeddings=positions), capacity=0.6)
    fit_routing(model, [{"input_ids": tokens(8, 40)}])
    return model


MODELS: dict[str, Callable[[], Any]] = {"MLPs": with_routed_mlps, "blocks": routed_model, "dense": dense_model}


def written(model: Any, **options: Any) -> Answer:
    """An answer that is complete."""
    answer = Answer(model, word_tokenizer())
    *_, last = answer.write(PROMPT, Sampling(max_new_tokens=LENGTH, **options), chat=False)
    assert last is answer
    return answer


@pytest.mark.parametrize("kind", MODELS)
def test_an_answer_is_that_of_generate_and_counts_who_entered(kind: str) -> None:
    model, tokenizer = MODELS[kind](), word_tokenizer()
    with measured_shares(model) as meter:
        expected = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=LENGTH))
    answer = written(model)
    assert ("".join(answer.pieces), answer.state) == (expected.text, "done")
    assert answer.figures()["tokens"] == str(LENGTH)
    if kind == "dense":
        assert (answer.layers, answer.depths, set(answer.figures())) == ([], [], {"tokens", "tokens a second"})
        return
    shares = meter.read()
    assert len(answer.depths) == LENGTH - 1  # the last token is not read
    assert answer.read == shares.tokens == 5 + LENGTH - 1
    flops = forward_flops_per_token(model, answer.read, shares=shares.by_layer)
    flops /= forward_flops_per_token(model, answer.read, dense=True)
    assert answer.figures()["of dense FLOPs"] == f"{flops:.1%}"
    assert answer.figures()["of tokens entered"] == f"{shares.overall:.1%}"


def test_depths_are_those_of_a_pass_over_the_whole_text() -> None:
    model, tokenizer = with_routed_mlps(), word_tokenizer()
    answer = written(model)
    ids = tokenizer(PROMPT + " " + "".join(answer.pieces), return_tensors="pt")["input_ids"]
    routing = model(ids, output_routing=True).routing
    depths = sum(record.selected[0].long() for record in routing).tolist()
    assert answer.depths == depths[5:-1]
    assert len(set(answer.depths)) > 1


def test_the_drawing_escapes_text_and_colors_depth() -> None:
    answer = Answer(with_routed_mlps(), word_tokenizer())
    answer.pieces, answer.depths = ["<b>\n", "x\x1b", "&"], [0, len(answer.layers)]
    drawn = draw({"γ = 0.6": answer})
    assert "<b>" not in drawn
    assert "&lt;b&gt;" in drawn
    assert re.findall(r'class="t (\w+(?: end)?)">(.*?)<', drawn) == [
        ("c0", "&lt;b&gt;"),
        ("c0 end", "⏎"),
        ("c0", ""),
        ("c16", "x␛"),
        ("plain", "&amp;"),
    ]


def answered(demo: Demo, turns: Turns) -> str:
    """The last drawing; "" if there is none."""
    last = [drawing for drawing in demo.answer(turns) if isinstance(drawing, str)]
    return last[-1] if last else ""


def test_a_later_press_ends_an_answer_and_has_the_last_word() -> None:
    demo, turns = Demo("tiny", with_routed_mlps(), word_tokenizer()), Turns()
    assert answered(demo, turns) == ""  # nobody asked
    turns.ask_again(PROMPT, 0.3, 8, 0.0, False, False)
    assert answered(demo, turns) == ""  # nothing was asked before
    turns.ask(PROMPT, 0.3, 400, 0.0, False, True)
    drawings = demo.answer(turns)
    assert "writing" in next(drawings)
    turns.ask_again(PROMPT, 0.4, 400, 0.0, False, True)
    turns.ask_again(PROMPT, 0.5, 8, 0.0, False, True)
    assert 'class="answer stopped"' in list(drawings)[-1]
    last = answered(demo, turns)
    assert last.count('class="answer done"') == 2
    assert "γ = 0.5" in last
    assert answered(demo, turns) == ""
    turns.ask(PROMPT, 0.3, 8, 0.0, False, False)
    turns.end()
    assert answered(demo, turns) == ""


@pytest.mark.parametrize(
    ("length", "temperature", "words"),
    [(None, 0.0, "“max new tokens” 0: ask for 1"), (600, 0.0, "512 positions"), (8, -1.0, "“temperature” -1.0")],
)
def test_what_cannot_be_written_is_said_on_the_page(length: int | None, temperature: float, words: str) -> None:
    turns = Turns(asked=1, wanted=("a", 1.0, length, temperature, False, False))
    shown = answered(Demo("tiny", dense_model(), word_tokenizer()), turns)
    assert 'role="alert"' in shown
    assert words in shown


def test_without_gradio(dtf: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_page, "find_spec", lambda name: None)
    result = dtf("demo", "no-such-model")
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert "pip install 'dtfcli[demo]'" in result.stderr
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no such address"):
        demo_page.require_demo("no host", 0)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `dtf demo` shows a model with routed MLPs; ended by Ctrl-C."""
    pytest.importorskip("gradio")
    folder, log = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("log") / "stderr"
    with_routed_mlps(POSITIONS).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    command = [sys.executable, "-m", "dtfcli", "demo", str(folder), "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            env=os.environ | {"NO_COLOR": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
    try:
        deadline, address = time.monotonic() + SECONDS, None
        while address is None and process.poll() is None and time.monotonic() < deadline:
            address = re.search(r"Uvicorn running on (http://[\d.:]+)", log.read_text())
            time.sleep(0.1)
        assert address is not None, log.read_text()
        yield address[1]
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=SECONDS)
        assert (process.returncode, printed) == (130, ""), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser: Any, url: str, width: int = 1200, scheme: str = "light") -> tuple[Any, list[str], list[str]]:
    """A page, the addresses it asks for, and the errors of its scripts."""
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.get_by_label("Prompt", exact=True).wait_for()
    return page, requests, errors


def shown(page: Any, heading: str) -> tuple[str, list[str], str]:
    """Text, colors and share of FLOPs of the first answer, once it is complete under this heading."""
    answer = page.locator(".answer.done", has=page.get_by_role("heading", name=heading))
    answer.first.wait_for()
    colors = "all => all.map(one => getComputedStyle(one).backgroundColor)"
    return (
        answer.first.locator(".reading").inner_text(),
        answer.first.locator(".t").evaluate_all(colors),
        answer.first.locator(".tiles").inner_text().split("of dense FLOPs")[1].split()[0],
    )


@pytest.mark.slow
def test_the_page_by_keyboard(browser: Any, url: str) -> None:
    page, requests, errors = opened(browser, url)
    page.keyboard.press("Tab")
    prompt = page.get_by_label("Prompt", exact=True)
    for _ in range(5):
        if prompt.evaluate("box => box === document.activeElement"):
            break
        page.keyboard.press("Tab")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    first = shown(page, "γ = 0.6")
    assert len(first[0].split()) == len(first[1]) == 64
    assert len(set(first[1])) > 2  # depths have colors
    slider = page.get_by_role("slider")
    slider.focus()
    for key in ("ArrowRight", "ArrowRight", "End", "Home"):  # the last one counts
        page.keyboard.press(key)
    second = shown(page, "γ = 0.05")
    assert all(a != b for a, b in zip(first, second, strict=True)), "text, colors and FLOPs follow the slider"
    assert float(second[2].strip("%")) < float(first[2].strip("%"))
    page.get_by_label("beside it").check()
    page.get_by_role("button", name="Write").press("Enter")
    page.locator(".answer.done:nth-child(2)").wait_for()
    assert page.locator(".answer").nth(1).locator("h2").inner_text().startswith("dense")
    page.get_by_label("Max new tokens").fill(str(POSITIONS))
    page.get_by_role("button", name="Write").press("Enter")
    assert f"{POSITIONS} positions" in page.get_by_role("alert").inner_text()
    assert not errors
    assert not [address for address in requests if not address.startswith((url, "data:", "blob:"))]


@pytest.mark.slow
def test_a_narrow_dark_page_and_stop(browser: Any, url: str) -> None:
    page, _, errors = opened(browser, url, 360, "dark")
    page.get_by_label("Max new tokens").fill("4000")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.locator(".answer.writing .t").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator(".answer.stopped").wait_for()
    assert page.locator(".t").count() < 4000
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.dataset.theme]") == [
        360,
        "dark",
    ]
    lightness = "one => getComputedStyle(one).color.match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0)"
    assert page.locator(".answer h2").evaluate(lightness) > 500
    assert not errors
