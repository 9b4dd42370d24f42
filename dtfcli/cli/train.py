"""`dtf train`: settings → a run folder with a trained model."""

import os
import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError

if TYPE_CHECKING:
    from dtfcli.settings import Settings
    from dtfcli.training.events import TrainListener
    from dtfcli.training.loop import TrainResult


Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PRESET] [KEY=VALUE]...",
        help="A preset (`dtf presets list`), then settings that override it. With --resume: the run folder.",
        autocompletion=options.complete_preset_or_setting,
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A TOML file of settings, laid over the preset."),
]
Base = Annotated[
    str,
    typer.Option(
        "--base", metavar="MODEL", help="The model to start from; the same as model.base=MODEL.", show_default=False
    ),
]
Text = Annotated[
    str,
    typer.Option(
        "--text",
        metavar="FILE|FOLDER|DATASET",
        help="Text to train on, in place of data.sources: a .txt, .md, .py, .jsonl or .parquet file, a folder of them, "
        "python-stdlib, or OWNER/NAME or OWNER/NAME:CONFIG on the Hub.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue an interrupted run: the one named, else the newest."),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        "--num-processes",
        metavar="N",
        min=1,
        help="Train with N processes on this machine, one for each device; unset: 1, or as many as the run had.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, show settings, size and cost of the model, and stop."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the base model (model.trust_remote_code=true); --resume asks for it anew.",
    ),
]


def train(
    arguments: Arguments = None,
    config: Config = None,
    base: Base = "",
    text: Text = "",
    resume: Resume = False,
    num_processes: NumProcesses = None,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Train a model: DTF, MoD or dense, from scratch or from a pretrained one.

    The last line on stdout is the folder of the final model. Without PRESET: `<architecture>-qwen2.5-0.5b`.

    \b
    Examples:
      dtf train quickstart
      dtf train quickstart model=mod run.name=mod-run1 training.max_steps=200
      dtf train dtf-smollm2-135m data.sources='[{path="novels.parquet"}]'
      dtf train recover --base smollm2-routed --text novels.parquet
      dtf train thesis-dtf --dry-run
      dtf train dtf-qwen2.5-0.5b --num-processes 8
      dtf train --resume outputs/2025-12-01/quickstart
    """
    if resume:
        if dry_run or config is not None or base or text:
            options_given = {"--dry-run": dry_run, "--config": config, "--base": base, "--text": text}
            option = next(name for name, value in options_given.items() if value)
            raise ConfigError(f"{option}: a resumed run keeps the settings it began with; leave it out.")
        _resume(list(arguments or ()), num_processes, trust_remote_code, json)
        return
    from dtfcli.settings import load_settings

    preset, overrides = options.split_preset(arguments)
    overrides = [*overrides, *_base_and_text(base, text, overrides)]
    overrides += ["model.trust_remote_code=true"] if trust_remote_code else []
    settings = load_settings(preset, overrides, config)
    if dry_run:
        _dry_run(settings, num_processes, json)
        return
    if _launched(settings, num_processes):
        return
    from dtfcli.settings.resolve import Sources
    from dtfcli.settings.sources import lookup

    # A name that the user chose is never changed, even if it is taken.
    chosen = lookup(Sources(type(settings), preset, overrides, config).user, "run.name")
    _train(settings, None, rename=chosen is None, json=json)


def _base_and_text(base: str, text: str, overrides: list[str]) -> list[str]:
    """--base and --text as settings; a data set on the Hub is read while training."""
    from dtfcli.settings.data import Source

    for option, given, key in (("--base", base, "model.base"), ("--text", text, "data.sources")):
        if given and any(item.startswith((f"{key}=", f"{key}[", f"{key}.")) for item in overrides):
            raise ConfigError(f"{option} and {key}=… say the same; give one of them.")
    here = Path(text).exists() or text == "python-stdlib"
    sources = [Source.named(text, streaming=not here).model_dump(exclude_none=True)] if text else []
    return [
        *([f"model.base={dumps(base, ensure_ascii=False)}"] if base else []),
        *([f"data.sources={dumps(sources, ensure_ascii=False)}"] if text else []),
    ]


def _launched(settings: "Settings", processes: int | None) -> bool:
    """Run the same command in several processes, to its end; False: this process does the work itself."""
    from_outside = os.environ.get("WORLD_SIZE")
    if from_outside is not None:
        if processes is not None and processes != int(from_outside):
            raise ConfigError(
                f"--num-processes {processes}: the launcher started {from_outside}; leave the option out."
            )
        return False
    if processes is None or processes == 1:
        return False
    from dtfcli.cli.launch import launch
    from dtfcli.training.distributed import check_processes

    check_processes(settings, processes)
    code = launch(sys.argv[1:], processes)
    if code:
        raise SystemExit(code)  # the processes have printed why
    return True


def _resume(arguments: list[str], processes: int | None, trusted: bool, json: bool) -> None:
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    if overrides:
        raise ConfigError(f"{overrides[0]}: a resumed run keeps the settings it began with; leave it out.")
    if len(arguments) > 1:
        raise ConfigError(f"--resume takes one run folder, not {len(arguments)}: {' '.join(arguments)}.")
    from dtfcli.runs.folder import SETTINGS_FILE, locked, newest_run, processes_of, run_settings
    from dtfcli.settings.sources import environment_name

    if arguments and arguments[0]:
        folder = Path(arguments[0])
    else:
        folder = newest_run(Path(os.environ.get(environment_name("run.output_dir"), "outputs")))
    settings = run_settings(folder)
    if settings.model.trust_remote_code and not trusted:  # the folder may be somebody else's
        raise ConfigError(
            f"{folder / SETTINGS_FILE}: model.trust_remote_code = true: code that comes with {settings.model.base} "
            "would run; if you trust it, add --trust-remote-code."
        )
    if "WORLD_SIZE" not in os.environ:  # else one of the others may be at work already
        with locked(folder):
            pass  # an error before any process is started
    if not _launched(settings, processes or processes_of(folder)):
        _train(settings, folder, rename=False, json=json)


def _train(settings: "Settings", resume: Path | None, *, rename: bool, json: bool) -> None:
    from dtfcli.cli import render, train_view

    if int(os.environ.get("RANK") or 0):  # one of several, which has nothing to say
        _run_training(settings, resume, rename)
        return
    with train_view.view_of(settings) as view:
        result = _run_training(settings, resume, rename, view)
    if json:
        render.emit_json(result)
        return
    train_view.show_summary(result, settings)
    render.emit(str(result.final_model_path))


def _run_training(
    settings: "Settings", resume: Path | None, rename: bool, view: "TrainListener | None" = None
) -> "TrainResult":
    """Imports late, so that there is something to see while torch and Transformers load."""
    from dtfcli.experiment import train
    from dtfcli.loading.devices import keep_freed_memory, resolve_device

    if resolve_device(settings.run.device).type == "cpu":
        keep_freed_memory()
    return train(settings, resume=resume, rename=rename, on_event=view)


def _dry_run(settings: "Settings", processes: int | None, json: bool) -> None:
    from dtfcli.cli import render, train_view
    from dtfcli.experiment import preview

    dry_run = preview(settings, processes)
    if json:
        document = {
            "settings": dry_run.settings.model_dump(exclude_none=True),
            "account": dry_run.account,
            "tokens_per_update": dry_run.settings.tokens_per_update,
            "updates": dry_run.plan.total_steps if dry_run.plan else None,
        }
        render.emit_json(document)
        return
    render.emit(dry_run.settings.to_toml())
    rows = train_view.account_rows(dry_run.account, dry_run.plan, dry_run.settings, processes or 1)
    render.show_table(["Cost", "", ""], rows)
