"""`dtf convert`: a dense model → a routed one, and what each saving costs."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError

if TYPE_CHECKING:
    from dtfcli.conversion.convert import ConversionOptions

LEAST_RECOVERY = 4096

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write; new, or empty.", show_default=False),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show parameters, γ, routed layers, and an estimate of memory and processor time, and stop. Reads no "
        "weights: a config.json is enough.",
    ),
]
Save = Annotated[
    float | None,
    typer.Option(
        "--save",
        metavar="SHARE",
        parser=options.share("--save"),
        help="Share of a forward pass's FLOPs to leave out, such as 20% or 0.2. Default: 10%.",
        show_default=False,
    ),
]
Capacity = Annotated[
    float | None,
    typer.Option(
        "--capacity",
        metavar="γ",
        parser=options.share("--capacity"),
        help="Instead: the share of tokens that enter a routed MLP, such as 80% or 0.8.",
        show_default=False,
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        "--max-loss",
        metavar="NATS",
        help="Instead: the largest saving whose measured loss is at most NATS above the dense model's.",
        show_default=False,
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE|FOLDER|DATASET",
        help=(
            "Text to fit to and to measure on, of the kind that the model is for: a .txt, .md, .py, .jsonl or .parquet "
            "file, a folder of them, python-stdlib, or OWNER/NAME or OWNER/NAME:CONFIG on the Hub. Default: web pages, "
            "HuggingFaceFW/fineweb-edu."
        ),
        show_default=False,
    ),
]
Recover = Annotated[
    str | None,
    typer.Option(
        "--recover",
        metavar="TOKENS",
        help="Afterwards learn from the dense model for so many tokens of the text, such as 300k or 1M, to win back "
        "what skipping lost. With 135M parameters 300k tokens take 40 minutes of a CPU core.",
        show_default=False,
    ),
]
To = Annotated[
    Literal["dtf", "mod", "random", "layerdrop"],
    typer.Option(
        "--to",
        help=(
            "dtf: by what skipping would lose. Controls: random, tokens by chance; layerdrop, whole MLPs. mod: "
            "Mixture-of-Depths, whose router has to be trained afterwards."
        ),
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the choice of text, and of random routers.")]


@options.opens_models("routing", "capacity", "quantize")
def convert(
    model: options.Model,
    output: Output = None,
    save: Save = None,
    capacity: Capacity = None,
    max_loss: MaxLoss = None,
    text: Text = None,
    to: To = "dtf",
    recover: Recover = None,
    seed: Seed = 42,
    dry_run: DryRun = False,
    *,
    loading: options.Loading,
    json: options.Json = False,
) -> None:
    """Convert a dense model into one whose tokens skip MLPs, and measure what each saving costs.

    Nothing is trained, unless --recover asks for it.

    The folder gets the model, its tokenizer, and a report: report.md, report.json, report.png. One model runs at any
    capacity: --capacity of generate, serve and eval. The last line on stdout is the folder.

    \b
    Examples:
      dtf convert HuggingFaceTB/SmolLM2-135M -o routed
      dtf convert HuggingFaceTB/SmolLM2-135M -o routed --save 20% --text notes/
      dtf convert Qwen/Qwen2.5-7B --dry-run
      dtf convert model.gguf -o routed --max-loss 0.05 --text novels.parquet
      dtf convert model.gguf -o routed --recover 1M --text novels.parquet
      dtf convert model.gguf -o control --to random --text novels.parquet
    """
    from dtfcli.cli import convert_view, render

    with render.Steps() as show:
        if output is None and not dry_run:
            raise ConfigError("-o FOLDER is missing: the folder to write; or ask for an estimate with --dry-run.")
        if dry_run and (to == "mod" or recover is not None):
            raise ConfigError("--dry-run: a recovery and mod are training, which is not estimated; leave them out.")
        wanted = _options(save, capacity, max_loss, text, to, recover, seed, loading)
        from dtfcli.conversion.convert import convert_model
        from dtfcli.conversion.estimate import estimate
        from dtfcli.loading.source import open_source

        trust = loading.trust_remote_code
        source = open_source(model, loading.revision, trust_remote_code=trust, weights=not dry_run)
        if output is None or dry_run:
            account = estimate(source, wanted)
        else:
            report = convert_model(source, output, wanted, show)
    if output is None or dry_run:
        render.emit_json(account) if json else convert_view.show_estimate(account)
    elif json:
        render.emit_json(report.to_dict() | {"folder": output})
    else:
        convert_view.show(report, output)
        render.emit(str(output))


def _options(
    save: float | None,
    capacity: float | None,
    max_loss: float | None,
    text: str | None,
    to: Literal["dtf", "mod", "random", "layerdrop"],
    recover: str | None,
    seed: int,
    loading: options.Loading,
) -> "ConversionOptions":
    """Refuses what cannot be meant, before anything is imported or loaded."""
    given = [
        name
        for name, value in (("--save", save), ("--capacity", capacity), ("--max-loss", max_loss))
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} say the same in different ways; give one of them.")
    if save is not None and not 0.0 < save < 1.0:
        raise ConfigError(f"--save {100 * save:g}%: a share of the FLOPs, above 0% and below 100%; write 10% or 0.1.")
    if capacity is not None and not 0.0 < capacity <= 1.0:
        raise ConfigError(f"--capacity {capacity:g}: the share of tokens that enter; give one above 0 and at most 1.")
    if max_loss is not None and not 0.0 < max_loss < float("inf"):
        raise ConfigError(f"--max-loss {max_loss:g}: nats per token above the dense loss; give a number above 0.")
    if max_loss is not None and to == "mod":
        raise ConfigError("--max-loss: mod has to be trained before its loss means anything; give --capacity.")
    if max_loss is not None and recover is not None:
        raise ConfigError("--max-loss: chooses before a recovery, which changes the loss; give --save with --recover.")
    from dtfcli.conversion.convert import ConversionOptions

    return ConversionOptions(
        to=to,
        save=save,
        capacity=capacity,
        max_loss=max_loss,
        text=text,
        recover=0 if recover is None else _tokens(recover),
        seed=seed,
        loading={
            "device": loading.device,
            "dtype": loading.dtype,
            "attn_implementation": loading.attn_implementation,
        },
    )


def _tokens(text: str) -> int:
    """300k, 1M or 1000000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", text)
    tokens = round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2].lower()]) if match else 0
    if tokens < LEAST_RECOVERY:
        raise ConfigError(f"--recover {text}: tokens, {LEAST_RECOVERY:,} at least; write 300k, 1M or 1000000.")
    return tokens
