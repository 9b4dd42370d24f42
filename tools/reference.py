"""Write docs/cli.md and docs/settings.md from the live code, or check that they are current.

python -m tools.reference            # write
python -m tools.reference --check    # exit 1 and say what to do when a page differs
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo

from dtfcli.cli.app import app
from dtfcli.models.configuration_fields import RoutingFields
from dtfcli.settings import Settings
from dtfcli.settings.describe import describe_type, walk
from dtfcli.settings.sources import environment_name, preset_names, preset_summary

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = "python -m tools.reference"


def cli_page() -> str:
    """Every command with its help, examples, arguments and options."""
    root = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        f"<!-- Made by `{COMMAND}` from the live command line; do not edit. -->",
        "",
        "`python -m dtfcli` is the same as `dtf`. Exit codes: 0 done, 1 failed while running, 2 the input is wrong,",
        "130 interrupted. Results go to stdout; logs, progress and tables of progress to stderr. `--debug`, anywhere,",
        "shows the traceback of an error.",
        "",
    ]
    for name, command in _commands("dtf", root):
        lines += _command_section(name, command)
    return "\n".join(lines).rstrip() + "\n"


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child in sorted(getattr(command, "commands", {})):
        yield from _commands(f"{name} {child}", command.commands[child])


def _command_section(name: str, command: Any) -> list[str]:
    text, examples = _split_help(command.help or "")
    lines = [f"{'##' if name.count(' ') < 2 else '###'} {name}", "", text, ""]
    if examples:
        lines += ["```bash", *examples, "```", ""]
    rows = [_parameter_row(p) for p in command.params if p.name not in ("install_completion", "show_completion")]
    if rows:
        lines += ["| | |", "|---|---|", *rows, ""]
    return lines


def _split_help(text: str) -> tuple[str, list[str]]:
    """Help without rich's escapes: the prose, and the example lines."""
    text = text.replace("\\[", "[").replace("\b\n", "")
    prose, _, examples = text.partition("Examples:")
    return prose.strip(), [line.strip() for line in examples.splitlines() if line.strip()]


def _parameter_row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        label = parameter.metavar or parameter.name.upper()
    else:
        label = ", ".join([*parameter.opts, *parameter.secondary_opts])
        if parameter.metavar:
            label += f" {parameter.metavar}"
    help_text = (parameter.help or "").replace("\\[", "[")
    default = parameter.default
    shown = isinstance(default, (str, int, float)) and not isinstance(default, bool) and parameter.show_default
    return f"| `{_cell(label)}` | {_cell(help_text)}{f' Default: `{default}`.' if shown else ''} |"


def settings_page() -> str:
    """Every setting with its type, default and meaning, and the presets."""
    lines = [
        "# Settings",
        "",
        f"<!-- Made by `{COMMAND}` from the schema; do not edit. -->",
        "",
        "A run's settings come from, highest first: overrides on the command line (`training.max_steps=200`), the",
        f"environment (`{environment_name('training.max_steps')}=200`), a TOML file (`--config FILE`), the preset, the",
        "defaults below. Values are read as JSON, then as TOML, else as text; `model=mod` is short for",
        "`model.architecture=mod`. Unknown keys, and settings that nothing would read, are refused.",
        "",
        "## Presets",
        "",
        "| Preset | What it is for |",
        "|---|---|",
        *[f"| `{name}` | {_cell(preset_summary(name))} |" for name in preset_names()],
        "",
    ]
    routing_defaults = {f.name: f.default for f in fields(RoutingFields)}
    for group in Settings.model_fields:
        lines += [f"## {group}", "", "| Key | Type | Default | Meaning |", "|---|---|---|---|"]
        for key, field in walk(Settings):
            if key.startswith(f"{group}."):
                default = _default(key, field, routing_defaults)
                kind = describe_type(field.annotation)
                lines.append(f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(field.description or '')} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _default(key: str, field: FieldInfo, routing_defaults: dict[str, Any]) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    name = key.removeprefix("model.")
    if value is None and name in routing_defaults:
        value = routing_defaults[name]
    if key == "data.sources":
        value = [source.model_dump(exclude_defaults=True) for source in value]
    return "unset" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Write the pages, or with --check compare them; returns the exit code."""
    stale = []
    for name, text in (("cli.md", cli_page()), ("settings.md", settings_page())):
        path = DOCS / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(f"docs/{name}")
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8", newline="\n")
    if stale and "--check" in sys.argv:
        sys.stderr.write(f"{' and '.join(stale)}: not current. Run: {COMMAND}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
