"""The page: Gradio's controls beside one drawing, in the colors of the inspector's page.

Gradio keeps no statistics, loads nothing from elsewhere, and computes one answer at a time. All text is escaped.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dtfcli.demo.answers import Answer
from dtfcli.errors import ConfigError, DTFError
from dtfcli.generation import Sampling
from dtfcli.inspection.page import view_style
from dtfcli.inspection.palette import LEVELS
from dtfcli.inspection.tokens import visible
from dtfcli.models.conversion import to_dense
from dtfcli.models.pretrained import is_routed
from dtfcli.serving.access import KeyGate
from dtfcli.serving.server import require_address

_LEAST = 0.05
"""The left end of the slider."""


def require_demo(host: str, port: int) -> None:
    """Raise a ConfigError, before a model is loaded, if Gradio is missing or the address cannot be listened on."""
    if find_spec("gradio") is None:
        raise ConfigError("dtf demo needs Gradio: pip install 'dtfcli[demo]'.")
    require_address(host, port)


@dataclass
class Turns:
    """Of one browser window: what it asked for last; an answer to anything before that ends, or does not begin."""

    asked: int = 0
    begun: int = 0
    wanted: tuple[Any, ...] = ()

    def ask(self, *wanted: Any) -> None:
        """Want a new answer."""
        self.asked, self.wanted = self.asked + 1, wanted

    def ask_again(self, *wanted: Any) -> None:
        """Want a new answer if there was one."""
        if self.begun:
            self.ask(*wanted)

    def end(self) -> None:
        """Want no answer."""
        self.asked = self.begun = self.asked + 1


class Demo:
    """A model and its page."""

    def __init__(self, name: str, model: Any, tokenizer: Any, capacity: float | None = None) -> None:
        """`name` is what the page calls the model; `capacity` is the γ that was asked for, None the model's own."""
        self.name, self.model, self.tokenizer, self.capacity = name, model, tokenizer, capacity
        self.routed = len(model.routed_layers) if is_routed(model) else 0
        gamma: Any = model.capacity if self.routed else 1.0
        self.gamma = round(sum(gamma) / len(gamma) if isinstance(gamma, (list, tuple)) else gamma, 2)

    def answer(self, turns: Turns) -> Iterator[Any]:
        """The drawing of what is wanted, again and again while the model writes."""
        import gradio as gr

        if turns.begun == turns.asked:
            yield gr.skip()
            return
        turn = turns.begun = turns.asked
        prompt, gamma, length, temperature, is_chat, beside = turns.wanted
        try:
            sampling, answers = Sampling(int(length or 0), float(temperature or 0.0)), dict[str, Answer]()
            models = {f"γ = {gamma:g}" if self.routed else "dense": self.model}
            if self.routed:
                self.model.set_routing(self.model.routing, self.capacity if gamma == self.gamma else float(gamma))
                models |= {"dense": to_dense(self.model)} if beside else {}
            for heading, model in models.items():
                answers[heading] = Answer(model, self.tokenizer)
                for answer in answers[heading].write(prompt, sampling, is_chat):
                    answer.is_stopped |= turns.asked != turn
                    yield draw(answers)
                if turns.asked != turn:
                    return
        except (DTFError, ValueError, RuntimeError) as error:
            message = re.sub(r"--([\w-]+)", lambda option: f"“{option[1].replace('-', ' ')}”", str(error))
            yield f'<p class="failure" role="alert">{escape(visible(message))}</p>'

    def blocks(self) -> Any:
        """The page as Gradio's blocks."""
        import gradio as gr

        about = f"{self.routed} of {self.model.config.num_hidden_layers} layers let only some tokens in."
        about = about if self.routed else "A dense model: every token takes all layers, there is nothing to turn."
        hint = '<div class="reading hint">Write a prompt and press Enter. Then turn the slider.</div>'
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        with gr.Blocks(analytics_enabled=False, title=f"{self.name} · dtf demo", fill_width=True) as page, gr.Row():
            with gr.Column(scale=2, min_width=280):
                head = f'<p class="eyebrow">dtf demo</p><h1>{escape(self.name)}</h1><p>{about}</p>'
                gr.HTML(head, apply_default_css=False)
                prompt = gr.Textbox(label="Prompt", placeholder="The beginning of a text", lines=1, max_lines=12)
                gamma = gr.Slider(
                    minimum=min(_LEAST, self.gamma),
                    maximum=1.0,
                    value=self.gamma,
                    step=0.01,
                    label="γ: share of tokens that enter a routed layer",
                    info="The others take a cheap way around it. At 1 every token takes all layers.",
                    interactive=self.routed > 0,
                    buttons=["reset"],
                )
                with gr.Row():
                    length = gr.Number(64, label="Max new tokens", precision=0, min_width=110)
                    temperature = gr.Number(0.0, label="Temperature", step=0.1, min_width=110)
                has_chats = bool(self.tokenizer.chat_template)
                chat = gr.Checkbox(has_chats, label="The prompt is a chat message", visible=has_chats)
                beside = gr.Checkbox(False, label="The dense model's answer beside it", visible=self.routed > 0)
                with gr.Row():
                    write = gr.Button("Write", variant="primary", min_width=110)
                    stop = gr.Button("Stop", elem_id="stop", min_width=110)
            with gr.Column(scale=4, min_width=280):
                drawing = gr.HTML(_legend(self.routed) + hint, apply_default_css=False)
            turns = gr.State(Turns())
            stop.click(Turns.end, turns, None, queue=False, **quiet)
            wanted = [turns, prompt, gamma, length, temperature, chat, beside]
            quiet["trigger_mode"] = "multiple"
            for triggers, ask in (([write.click, prompt.submit], Turns.ask), ([gamma.input], Turns.ask_again)):
                asked = gr.on(triggers, ask, wanted, None, queue=False, **quiet)
                asked.then(self.answer, turns, drawing, concurrency_limit=1, concurrency_id="model", **quiet)
        return page

    def serve(self, host: str, port: int, api_key: str | None = None) -> None:
        """Answer browsers until SIGINT or SIGTERM; a key is the password that they ask for. Logs go to stderr."""
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI

        style, theme = (Path(__file__).with_name(name).read_text("utf-8") for name in ("page.css", "page.js"))
        options: dict[str, Any] = {"footer_links": [], "run_history": False, "ssr_mode": False, "server_name": host}
        options["max_file_size"] = 1  # bytes: the page uploads nothing
        options["head"] = f"<style>{view_style()}{style}</style><script>{theme}</script>"

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: Any = None) -> None:
                app.routes[-1].app.stop_event.set()  # Gradio's; else open pages would hold it up
                await super().shutdown(sockets)

        app: Any = gr.mount_gradio_app(FastAPI(), self.blocks(), "/", server_port=port, **options)
        gate = app if api_key is None else KeyGate(app, api_key, "Basic")
        Server(uvicorn.Config(gate, host, port, access_log=False, timeout_graceful_shutdown=1)).run()


def draw(answers: dict[str, Answer]) -> str:
    """Answers by heading, side by side: state, figures and colored tokens."""
    sections = []
    for heading, answer in answers.items():
        tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in answer.figures().items())
        sections.append(
            f'<section class="answer {answer.state}"><h2>{heading} <small role="status">{answer.state}</small></h2>'
            f'<dl class="tiles">{tiles}</dl><div class="reading" tabindex="0">{_tokens(answer)}</div></section>'
        )
    return _legend(len(next(iter(answers.values())).layers)) + f'<div class="answers">{"".join(sections)}</div>'


def _tokens(answer: Answer) -> str:
    """Lines of tokens, as the inspector's page has them; a token that nobody read yet is plain."""
    layers, lines = len(answer.layers), [""]
    for place, piece in enumerate(list(answer.pieces)):
        depth = answer.depths[place] if layers and place < len(answer.depths) else None
        said = "" if depth is None else f' title="{depth} of {layers} routed layers computed this token"'
        opened = f'<span{said} class="t {"plain" if depth is None else _level(depth, layers)}'
        first, *more = map(escape, visible(piece).split("\n"))
        lines[-1] += f'{opened}">{first}</span>'
        for part in more:
            lines[-1] += f'{opened} end">⏎</span>'
            lines.append(f'{opened}">{part}</span>')
    return "".join(f'<div class="line" dir="auto">{line}</div>' for line in lines)


def _legend(layers: int) -> str:
    """What the colors mean; nothing for a dense model."""
    steps = layers if layers < LEVELS else LEVELS - 1
    ramp = "".join(f'<i class="{_level(step, steps)}"></i>' for step in range(steps + 1)) if layers else ""
    ends = f'0 <span class="ramp">{ramp}</span> {layers} routed layers took the token'
    return f'<div class="legend">{ends}</div>' if layers else ""


def _level(depth: int, layers: int) -> str:
    """Class of the palette for a depth."""
    return f"c{round((LEVELS - 1) * depth / layers)}"
