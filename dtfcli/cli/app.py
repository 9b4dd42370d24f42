"""The `dtf` command: its sub-commands, and the boundary where errors become one or two lines and an exit code.

Nothing heavy is imported here or at the top of a command's file, so that `dtf --help` answers at once.
Exit codes: 0 done, 1 failed while running, 2 the user's input is wrong, 130 interrupted.
"""

import gc
import os
import sys
from collections.abc import Callable
from inspect import getdoc
from itertools import pairwise
from typing import Annotated, Any

import typer

from dtfcli import __version__
from dtfcli.cli import env, presets
from dtfcli.cli.bench import bench
from dtfcli.cli.compare import compare
from dtfcli.cli.convert import convert
from dtfcli.cli.demo import demo
from dtfcli.cli.eval import evaluate
from dtfcli.cli.generate import generate
from dtfcli.cli.inspect_routing import inspect_routing
from dtfcli.cli.push import push
from dtfcli.cli.serve import serve
from dtfcli.cli.train import train
from dtfcli.errors import DTFError, did_you_mean
from dtfcli.quiet import quiet_imports

# Typer before 0.27 raises Click's usage errors, later versions their own; these are the right ones in both.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
CommandLineError: type[Exception] = UsageError.__bases__[0]

app = typer.Typer(
    name="dtf",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        print(f"dtf {__version__}")  # noqa: T201  # rich would cost more than the rest of the command
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")] = False,
) -> None:
    """Dynamic Transformers: train, run and inspect models that spend their layers on the tokens that need them.

    \b
    Examples:
      dtf presets list
      dtf train quickstart
      dtf generate outputs/…/final_model "def main("
    """


def _help(command: Callable[..., None]) -> str:
    """A docstring whose paragraphs are as wide as the terminal; examples keep their lines."""
    paragraphs = (getdoc(command) or "").split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else part.replace("\n", " ") for part in paragraphs)


for _name, _command in (
    ("convert", convert),
    ("train", train),
    ("compare", compare),
    ("eval", evaluate),
    ("generate", generate),
    ("serve", serve),
    ("demo", demo),
    ("inspect-routing", inspect_routing),
    ("bench", bench),
    ("push", push),
    ("env", env.env),
):
    app.command(_name, help=_help(_command))(_command)
app.add_typer(presets.app, name="presets")


def main() -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a γ must not end a command on an ASCII terminal
    quiet_imports()
    gc.set_threshold(10_000)  # importing torch makes objects by the million, which stay: a tenth of a start's time
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line without exiting; returns the exit code, after saying on stderr what went wrong."""
    arguments, debug = _clean(arguments)
    try:
        code = app(args=arguments, prog_name="dtf", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # Whoever read stdout is gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            sys.excepthook(type(error), error, error.__traceback__)
        return _report(error, arguments)
    if code == 130:
        from dtfcli.cli.render import fail

        fail("interrupted.")
    return code if isinstance(code, int) else 0


def _clean(arguments: list[str]) -> tuple[list[str], bool]:
    """Take out --debug, wherever it stands, and spell options with dashes (--max_new_tokens is accepted)."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = []
    for argument in arguments[:end]:
        name, equals, value = argument.partition("=")
        option = name.startswith("--") and "." not in name  # --training.max_steps is a setting, and the error says so
        if argument.startswith("--resume="):  # its value may be left out, so it is an argument of the command
            options += [name, value]
        else:
            options.append(name.replace("_", "-") + equals + value if option else argument)
    return [option for option in options if option != "--debug"] + arguments[end:], "--debug" in options


def _report(error: Exception, arguments: list[str]) -> int:
    """Say what went wrong, and return the exit code."""
    from dtfcli.cli.render import fail

    if isinstance(error, DTFError):
        fail(str(error))
        return error.exit_code
    if type(error).__name__ == "NoArgsIsHelpError":
        if str(error):
            error.show()  # type: ignore[attr-defined]  # older versions leave printing the help to us
        return 2
    if isinstance(error, CommandLineError):
        fail(_usage_message(error, arguments))
        return 2
    kind = type(error).__name__
    summary = next(iter(str(error).strip().splitlines()), "")
    fail(f"unexpected {kind}: {summary}\nRun the command again with --debug to see where.")
    return 1


def _usage_message(error: Exception, arguments: list[str]) -> str:
    """A usage error in two lines: the mistake with a suggestion, and the command that prints the help."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]  # all of them have it
    unknown = getattr(error, "option_name", None)
    if unknown and context and message.startswith("No such option"):
        known = [name for param in context.command.params for name in (*param.opts, *param.secondary_opts)]
        hint = did_you_mean(unknown, known)
        if "." in unknown:
            hint = f" Settings are written without dashes: {unknown.lstrip('-')}=…"
        message = f"No such option: {unknown}.{hint}"
    typed = _typed_value(getattr(error, "param", None), arguments)
    if typed is not None and typed not in message:
        message = message.replace("Invalid value for", f"Invalid value '{typed}' for", 1)
    if not message.endswith((".", "?", "…")):
        message += "."
    return f"{message}\nTry '{context.command_path if context else 'dtf'} --help'."


def _typed_value(parameter: Any, arguments: list[str]) -> str | None:
    """What was typed for an option; not every version of Typer repeats it in its message."""
    names = getattr(parameter, "opts", [])
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else following
    return None
