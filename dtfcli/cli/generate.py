"""`dtf generate`: continue a prompt, or a file of them."""

import json as json_module
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError

Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="[PROMPT]",
        help="Text to continue; without it, standard input, or on a terminal an interactive prompt.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to write.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 is greedy; 1 samples the model's own probabilities.")
]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens that hold this share.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the K likeliest tokens only; 0: from all.")]
Seed = Annotated[int, typer.Option("--seed", help="Repeats a sample.")]
AsChat = Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the tokenizer's chat template.")]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", help="A file with a prompt on each line, or .jsonl with a 'prompt' each."),
]
Output = Annotated[Path | None, options.new_file("--output", "Where --prompts writes its .jsonl.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Prompts of --prompts that are continued together.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Recompute the prefix for every token; slow.")]
Stats = Annotated[bool, typer.Option("--stats", help="Print speed and cache size to stderr.")]


@options.opens_models()
def generate(
    model: options.Model,
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    chat: AsChat = False,
    prompts: Prompts = None,
    output: Output = None,
    batch_size: BatchSize = 8,
    no_cache: NoCache = False,
    stats: Stats = False,
    *,
    loading: options.Loading,
    json: options.Json = False,
) -> None:
    """Continue a prompt; the text appears as it is written, and stdout holds the continuation alone.

    \b
    Examples:
      dtf generate outputs/2026-01-31/quickstart "def main("
      dtf generate MODEL "Once upon a time" --temperature 0.8 --seed 1
      dtf generate MODEL "import " --capacity 0.25      # route fewer tokens
      dtf generate MODEL "import " --quantize int8      # weights in 8 bits
      echo "A sentence to continue:" | dtf generate MODEL
      dtf generate MODEL --prompts prompts.jsonl --output answers.jsonl
    """
    from dtfcli.cli import generate_view, render

    text = _prompts(prompt, prompts, output, json)
    with render.Steps():
        from dtfcli.generation import Sampling, generate_many
        from dtfcli.generation import generate as continue_text

        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
        loaded, tokenizer = loading.open(model)
    decoding: dict[str, Any] = {"chat": chat, "use_cache": not no_cache}

    if text is None:
        from dtfcli.cli.interactive import Chat, run

        run(Chat(loaded, tokenizer, sampling, **decoding, show_stats=stats))
    elif isinstance(text, list):
        results = generate_many(loaded, tokenizer, text, sampling, **decoding, batch_size=batch_size)
        _keep_continuations(_shown(results, len(text)), output, json)
    elif json:
        document = asdict(continue_text(loaded, tokenizer, text, sampling, **decoding))
        render.emit_json(document if loading.quantize is None else document | {"quantization": loaded.quantization})
    else:
        result = continue_text(loaded, tokenizer, text, sampling, **decoding, on_text=render.write)
        render.write("\n")
        if result.new_tokens == 0 and max_new_tokens:
            render.warn("the model ended its answer at once; another prompt or a higher --capacity may help.")
        if stats:
            generate_view.show_stats(result)


def _prompts(prompt: str | None, prompts: Path | None, output: Path | None, json: bool) -> str | list[str] | None:
    """One prompt, those of a file, or None for the interactive prompt; refuses options that contradict each other."""
    if output is not None and prompts is None:
        raise ConfigError(f"--output {output}: goes with --prompts; a single continuation is on stdout.")
    if prompts is not None:
        if prompt is not None:
            raise ConfigError("PROMPT and --prompts: give one of them.")
        if output is None and not json:
            raise ConfigError(
                f"--prompts {prompts}: name the file for the results with --output FILE.jsonl, or add --json."
            )
        return _read_prompts(prompts)
    if prompt is not None:
        return prompt
    if sys.stdin is None:
        raise ConfigError('no PROMPT: write it after the model, as in: dtf generate MODEL "def main(", or pipe it in.')
    if sys.stdin.isatty():
        if json:
            raise ConfigError("--json: goes with a PROMPT; the interactive prompt has no document to print.")
        return None
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text ({error.reason}); pipe text.") from error


def _shown(results: Iterable[Any], total: int) -> Iterator[Any]:
    from dtfcli.cli import render

    with render.Steps("Generating") as show:
        for count, result in enumerate(results, 1):
            show("Generating", count / total)
            yield result


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise ConfigError(f"--prompts {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read as UTF-8 text ({error}).") from error
    if not lines:
        raise ConfigError(f"--prompts {path}: has no prompts; write one on each line.")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json_module.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f'--prompts {path}, line {number}: expected a JSON object with a "prompt".') from None
    return prompts


def _keep_continuations(numbered: Iterable[tuple[int, Any]], output: Path | None, json: bool) -> None:
    """Write the continuations to --output in the order of their prompts, and print them with --json."""
    from dtfcli.cli import render

    in_order = [result for _, result in sorted(numbered, key=lambda item: item[0])]
    results = [{"prompt": r.prompt, "text": r.text, "new_tokens": r.new_tokens} for r in in_order]
    if output is not None:
        output.write_text("".join(json_module.dumps(r, ensure_ascii=False) + "\n" for r in results), "utf-8")
        render.note(f"{len(results)} continuations in {output}")
    if json:
        render.emit_json(results)
