"""The prompt of `dtf generate MODEL` on a terminal: text in, continuation out, slash commands in between."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dtfcli.cli import render
from dtfcli.errors import ConfigError, DTFError, did_you_mean

HELP = """\
Type a text and the model continues it; earlier text stays in its context.
  /set                  show the settings
  /set NAME VALUE       change one: {names}
  /routing              color each answer by how many routed layers took its tokens, or stop coloring
  /stats                speed and cache after each answer, or no longer
  /reset                forget the conversation
  /help                 this text
  /quit                 leave (as does Ctrl-D)
Ctrl-C stops an answer, not the program."""

COMMANDS = ("/help", "/set", "/stats", "/routing", "/reset", "/quit")


@dataclass
class Chat:
    """What an interactive prompt remembers."""

    model: Any
    tokenizer: Any
    sampling: Any
    chat: bool = False
    use_cache: bool = True
    show_stats: bool = False
    show_routing: bool = False
    context: str = ""

    def answer(self, text: str) -> None:
        """Continue the context with this text and print each piece at once; Ctrl-C keeps the pieces so far."""
        from dtfcli.cli.generate_view import show_stats
        from dtfcli.generation import as_chat, generate

        prompt = self.context + (as_chat(self.tokenizer, text) if self.chat else text)
        pieces: list[str] = []

        def on_text(piece: str) -> None:
            pieces.append(piece)
            render.write(piece)

        result = None
        try:
            result = generate(
                self.model, self.tokenizer, prompt, self.sampling, use_cache=self.use_cache, on_text=on_text
            )
        except KeyboardInterrupt:
            render.write(" …")
        render.write("\n")
        self.context = prompt + "".join(pieces) + ("\n" if self.chat else "")
        if self.show_routing and pieces:
            self._color(prompt, "".join(pieces))
        if self.show_stats and result is not None:
            show_stats(result)

    def _color(self, prompt: str, answer: str) -> None:
        from dtfcli.cli.inspect_view import colored
        from dtfcli.inspection.text import inspect_text

        report = inspect_text(self.model, self.tokenizer, prompt + answer, other_mode=False)
        first = len(self.tokenizer(prompt)["input_ids"])
        render.out.print(colored(report, first))

    def command(self, line: str) -> bool:
        """Carry out a slash command; returns whether to go on. ConfigError: unknown command, setting or value."""
        name, *arguments = line.split()
        if name == "/quit":
            return False
        if name == "/help":
            names = ", ".join(field.name for field in dataclasses.fields(self.sampling))
            render.note(HELP.format(names=names))
        elif name == "/reset":
            self.context = ""
            render.note("Forgotten.")
        elif name == "/stats":
            self.show_stats = not self.show_stats
            render.note(f"stats {'on' if self.show_stats else 'off'}")
        elif name == "/routing":
            from dtfcli.models.pretrained import is_routed

            if not is_routed(self.model):
                raise ConfigError("/routing: this model is dense, every token takes every layer.")
            self.show_routing = not self.show_routing
            render.note(f"routing {'on' if self.show_routing else 'off'}")
        elif name == "/set":
            self._set(arguments)
        else:
            raise ConfigError(f"{name} is not a command.{did_you_mean(name, COMMANDS)} /help lists them.")
        return True

    def _set(self, arguments: list[str]) -> None:
        values = {field.name: getattr(self.sampling, field.name) for field in dataclasses.fields(self.sampling)}
        if not arguments:
            render.note("  ".join(f"{name} {value}" for name, value in values.items()))
            return
        name = arguments[0].replace("-", "_")
        if name not in values:
            raise ConfigError(f"/set {arguments[0]}: no such setting.{did_you_mean(name, values)}")
        if len(arguments) != 2:
            raise ConfigError(f"/set {name} takes one value, such as /set {name} {values[name]}.")
        try:
            value = type(values[name])(arguments[1])
        except ValueError:
            raise ConfigError(f"/set {name} {arguments[1]}: expected a number such as {values[name]}.") from None
        self.sampling = dataclasses.replace(self.sampling, **{name: value})
        render.note(f"{name} {value}")


def run(chat: Chat) -> None:
    """Read and answer until /quit or Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory

    render.note("Type a text to continue, /help for commands, Ctrl-D to leave.")
    names = [f"/set {field.name}" for field in dataclasses.fields(chat.sampling)]
    prompt: Any = PromptSession(
        history=InMemoryHistory(),
        completer=WordCompleter([*COMMANDS, *names], sentence=True),
        complete_while_typing=False,
    )
    while True:
        try:
            line = prompt.prompt("› ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    return
            else:
                chat.answer(line)
        except DTFError as error:
            render.fail(str(error))
