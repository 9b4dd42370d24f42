"""The first four steps: train a small dense model, convert it, let it write, look at what is routed.

python -m tools.quickstart                   # `make quickstart`: downloads nothing
python -m tools.quickstart MODEL             # the same on your own model: a Hub id, a folder or a .gguf file
python -m tools.quickstart MODEL --text TEXT

Each step is announced, and each command is printed before it runs, so that it can be typed again. docs/quickstart.md
shows the same commands; tests/test_tour.py compares the two.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    """A step: what it does, what to look at in its output, and its commands, with gaps such as {DENSE}."""

    title: str
    look: str
    commands: tuple[str, ...]


TRAIN = Step(
    "Train a small dense model on the Python standard library, from random weights.",
    'Look at the validation loss. It starts at 7.6, that of a guess among 2,048 tokens, and falls below "unigram", '
    "the loss of one who knows how often each token occurs and nothing else.",
    ("dtf train quickstart model=dense",),
)
CONVERT = Step(
    "Convert it: in some layers each token now enters the MLP or takes a cheap forecast of it. Nothing is trained.",
    'Look at the table. γ is the share of tokens that enter. Each line saves more of the FLOPs; "loss gap" says what '
    'that costs, "same" how often the likeliest next token stays the same. The arrow marks the saving that is kept.',
    ("dtf convert {DENSE} -o {ROUTED} --text {TEXT}",),
)
WRITE = Step(
    "Continue a prompt twice: at γ = 1, where every token enters every MLP, then at the saving that was kept.",
    "See whether the two texts part, and where. --capacity sets γ.",
    (
        'dtf generate {ROUTED} "{PROMPT}" --max-new-tokens 40 --capacity 1',
        'dtf generate {ROUTED} "{PROMPT}" --max-new-tokens 40',
    ),
)
LOOK = Step(
    "Draw which tokens enter which MLPs.",
    "Look at the picture: a row for each routed layer, a column for each token. A block is a token that entered, "
    "a dot is one that took the forecast.",
    ("dtf inspect-routing {ROUTED} --html {PAGE}",),
)
SMALL = (
    "This model shows the steps, no gain in time: a decoded token takes it about 3 ms, so that the last two columns of "
    "step 2 scatter."
)


def main() -> int:
    """Run the steps.

    Returns:
        The exit status: 0, or that of the command that failed.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="convert this dense model instead of training a small one")
    parser.add_argument("--text", help="text to fit to and to measure on (see dtf convert)")
    arguments = parser.parse_args()
    steps = [CONVERT, WRITE, LOOK] if arguments.model else [TRAIN, CONVERT, WRITE, LOOK]
    began, words = time.monotonic(), {}
    if arguments.model:
        name = Path(arguments.model).name.removesuffix(".gguf")
        words = places(arguments.model, _free(Path("outputs") / f"{name}-routed"))
        words |= {"PROMPT": "The old man looked up and", "TEXT": arguments.text or ""}
    for number, step in enumerate(steps, 1):
        _say(_filled(f"\nStep {number} of {len(steps)}. {step.title}"), bold=True)
        _say(_filled(step.look))
        step_began = time.monotonic()
        for command in step.commands:
            typed = arguments_of(command, words)
            _say(f"\n$ {shown(typed)}", bold=True)
            status, last_line = _run(typed[1:], captured=step is TRAIN)
            if status:
                _say(f"\nStep {number} failed: see above. Mend that, and type its command again.", bold=True)
                return status
        if step is TRAIN:
            run = Path(last_line).parent
            words = places(run.as_posix(), run / "routed") | {"PROMPT": "def main(", "TEXT": arguments.text or STDLIB}
        _say(f"\n({time.monotonic() - step_began:.0f} s)")
    _end(words, time.monotonic() - began, small=not arguments.model)
    return 0


STDLIB = "python-stdlib"


def places(dense: str, routed: Path) -> dict[str, str]:
    """The models and the page of a journey."""
    return {"DENSE": dense, "ROUTED": routed.as_posix(), "PAGE": (routed / "routing.html").as_posix()}


def arguments_of(command: str, words: Mapping[str, str]) -> list[str]:
    """The arguments of a step's command; an option whose value is empty is left out."""
    typed = [part.format_map(words) for part in shlex.split(command)]
    return typed[:-2] if typed[-1] == "" else typed


def shown(typed: list[str]) -> str:
    """A command as a reader types it here: with the `dtf` of this environment, unless that is the one on the PATH."""
    beside = Path(sys.executable).parent / "dtf"
    found = shutil.which("dtf")
    name = "dtf" if found and Path(found).parent == beside.parent else os.path.relpath(beside)
    return " ".join([name, *(part if _plain(part) else f'"{part}"' for part in typed[1:])])


def _plain(part: str) -> bool:
    return all(character.isalnum() or character in "_-./=%:\\" for character in part)


def _free(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 … that does not exist."""
    if not folder.exists():
        return folder
    return next(path for n in range(2, 10_000) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())


def _run(arguments: list[str], *, captured: bool) -> tuple[int, str]:
    """Run dtf; returns its exit status and, if captured, the last line of its stdout."""
    command = [sys.executable, "-m", "dtfcli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE if captured else None, text=True, encoding="utf-8")
    try:
        out = process.communicate()[0]
    except KeyboardInterrupt:  # it got the signal, too, and saves
        out = process.communicate()[0]
    lines = (out or "").splitlines()
    return process.returncode, lines[-1] if lines else ""


def _end(words: Mapping[str, str], seconds: float, *, small: bool) -> None:
    """Where things are, and what to do next."""
    _say(f"\nDone in {seconds // 60:.0f} min {seconds % 60:.0f} s.", bold=True)
    rows = {"dense model": words["DENSE"], "routed model": words["ROUTED"], "report": f"{words['ROUTED']}/report.md"}
    for name, place in (rows | {"picture": words["PAGE"]}).items():
        _say(f"  {name:<13} {place}")
    if small:
        _say(_filled(SMALL))
        _say("\nNext, with a network (270 MB): the same on a pretrained model.\n")
        _say("  make quickstart MODEL=HuggingFaceTB/SmolLM2-135M", bold=True)
    else:
        _say("\nNext: open the picture in a browser. docs/conversion.md has the other savings.")


def _filled(text: str) -> str:
    """Text in lines that fit the terminal, 100 characters at most."""
    blank = "\n" if text.startswith("\n") else ""
    return blank + textwrap.fill(text.strip(), min(100, shutil.get_terminal_size().columns))


def _say(text: str, *, bold: bool = False) -> None:
    styled = bold and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[1m{text}\033[0m" if styled else text, flush=True)  # noqa: T201


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
