"""`dtf presets`: list, show, copy and validate settings files."""

from pathlib import Path
from typing import Annotated

import typer

from dtfcli.cli import options
from dtfcli.settings import sources

app = typer.Typer(no_args_is_help=True, help="List, show, copy and validate presets: settings for `dtf train`.")

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A preset; `dtf presets list` shows them.",
        autocompletion=options.complete_preset,
        show_default=False,
    ),
]


@app.command("list")
def list_presets(json: options.Json = False) -> None:
    """List the presets that come with dtf.

    \b
    Examples:
      dtf presets list
      dtf presets list --json
    """
    from dtfcli.cli import render

    rows = [(name, sources.preset_summary(name)) for name in sources.preset_names()]
    if json:
        render.emit_json([{"name": name, "summary": summary} for name, summary in rows])
    else:
        render.show_table(["Preset", "What it is for"], rows)


@app.command()
def show(name: Name, json: options.Json = False) -> None:
    """Print a preset.

    \b
    Examples:
      dtf presets show quickstart
      dtf presets show thesis-dtf --json
    """
    from dtfcli.cli import render

    if json:
        render.emit_json(sources.read_preset(name))
    else:
        render.emit(sources.preset_path(name).read_text(encoding="utf-8"))


@app.command()
def copy(
    name: Name,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where to put it; must not exist yet.", show_default=False)
    ],
    json: options.Json = False,
) -> None:
    """Copy a preset to a file of your own, to edit and use with --config.

    \b
    Examples:
      dtf presets copy quickstart my.toml
      dtf train --config my.toml
    """
    from dtfcli.cli import render

    target = sources.copy_preset(name, file)
    if json:
        render.emit_json({"file": target})
    else:
        render.emit(str(target))
        render.note(f"Edit it, then: dtf presets validate {target} && dtf train --config {target}")


@app.command()
def validate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A settings file, or the name of a preset.", show_default=False)
    ],
    json: options.Json = False,
) -> None:
    """Check a settings file and report every mistake in it at once.

    \b
    Examples:
      dtf presets validate my.toml
      dtf presets validate my.toml --json
    """
    from dtfcli.cli import render
    from dtfcli.errors import ConfigError
    from dtfcli.settings.schema import file_problems

    if not file.exists() and str(file) in sources.preset_names():
        file = sources.preset_path(str(file))
    problems = file_problems(file)
    if json:
        render.emit_json({"file": file, "valid": not problems, "problems": problems})
        raise typer.Exit(2 if problems else 0)
    if problems:
        raise ConfigError("\n".join(problems))
    render.emit(f"{file}: valid")
