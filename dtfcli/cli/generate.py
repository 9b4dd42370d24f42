"""`dtf generate`: continue a prompt, or a file of them."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dtfcli.cli import options


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]",
            help="Text to continue; without it, standard input, or on a terminal an interactive prompt.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Write at most so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 is greedy; 1 samples the model's own probabilities.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Sample from the likeliest tokens that hold this share.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample from the so many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Repeats a sample.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the tokenizer's chat template.")] = False,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A file with a prompt on each line, or .jsonl with a 'prompt' each."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Where --prompts writes its .jsonl.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Recompute the prefix for every token; slow.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say on stderr how fast it was and what the cache holds.")
    ] = False,
    routing: options.Routing = "auto",
    capacity: options.Capacity = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attn_implementation: options.AttnImplementation = "sdpa",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt; the text appears as it is written, and stdout holds the continuation alone.

    \b
    Examples:
      dtf generate outputs/2026-01-31/quickstart "def main("
      dtf generate MODEL "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
      dtf generate MODEL "import " --capacity 0.25      # route fewer tokens
      echo "A sentence to go on with:" | dtf generate MODEL
      dtf generate MODEL --prompts prompts.txt --output answers.jsonl
    """
    from dtfcli.cli import render
    from dtfcli.errors import ConfigError
    from dtfcli.generation import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    if prompts is not None and prompt is not None:
        raise ConfigError("PROMPT and --prompts: give one of them.")
    if output is not None and prompts is None:
        raise ConfigError(f"--output {output}: goes with --prompts; a single continuation is on stdout.")
    if prompts is not None and output is None and not json:
        raise ConfigError(
            f"--prompts {prompts}: name the file for the results with --output FILE.jsonl, or add --json."
        )
    many = _read_prompts(prompts) if prompts is not None else None
    if output is not None and output.exists():
        raise ConfigError(f"--output {output}: exists already; name another file.")
    interactive = many is None and prompt is None and sys.stdin is not None and sys.stdin.isatty()
    if interactive and json:
        raise ConfigError("--json: goes with a PROMPT; the interactive prompt has no document to print.")
    text = None if many is not None or interactive else _prompt_or_stdin(prompt)

    from dtfcli.generation import generate as continue_text
    from dtfcli.generation import generate_many
    from dtfcli.loading.load import load_model, load_tokenizer

    loaded = load_model(
        model,
        routing=routing,
        capacity=capacity,
        device=device,
        dtype=dtype,
        revision=revision,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    if many is not None:
        results = []
        for result in render.track(
            generate_many(loaded, tokenizer, many, sampling, chat=chat, use_cache=not no_cache), len(many), "generating"
        ):
            results.append({"prompt": result.prompt, "text": result.text, "new_tokens": result.new_tokens})
        if output is not None:
            output.write_text("".join(json_module.dumps(r, ensure_ascii=False) + "\n" for r in results), "utf-8")
            render.note(f"{len(results)} continuations in {output}")
        if json:
            render.emit_json(results)
        return

    if interactive:
        from dtfcli.cli.interactive import Session, run

        run(Session(loaded, tokenizer, sampling, chat=chat, use_cache=not no_cache, show_stats=stats))
        return
    assert text is not None
    if json:
        render.emit_json(continue_text(loaded, tokenizer, text, sampling, chat=chat, use_cache=not no_cache))
        return
    result = continue_text(loaded, tokenizer, text, sampling, chat=chat, use_cache=not no_cache, on_text=render.write)
    render.write("\n")
    if stats:
        show_stats(result)


def show_stats(result: Any) -> None:
    """One line on stderr: speed, cache and routed share of a continuation."""
    from dtfcli.cli import render

    stats = result.stats
    parts = [f"prefill {stats.prefill_tokens_per_second:,.0f} tokens/s"]
    if stats.decode_tokens_per_second is not None:
        parts.append(f"decode {stats.decode_tokens_per_second:,.1f} tokens/s")
    if stats.cache_bytes is not None:
        share = stats.cache_bytes / stats.dense_cache_bytes
        parts.append(f"cache {stats.cache_bytes / 2**20:.2f} MiB, {share:.2f} of a dense model's")
    if stats.routed_share is not None:
        parts.append(f"routed share {stats.routed_share:.2f}")
    render.note(" · ".join(parts))


def _prompt_or_stdin(prompt: str | None) -> str:
    from dtfcli.errors import ConfigError

    if prompt is not None:
        return prompt
    if sys.stdin is None:
        raise ConfigError('no PROMPT: write it after the model, as in: dtf generate MODEL "def main(", or pipe it in.')
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text ({error.reason}); pipe text.") from error


def _read_prompts(path: Path) -> list[str]:
    from dtfcli.errors import ConfigError

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
