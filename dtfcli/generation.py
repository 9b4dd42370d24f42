"""Prompt → continuation, streamed, for dense and routed models alike. Transformers' `generate` does the work."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer, set_seed
from transformers.generation.streamers import BaseStreamer

from dtfcli.errors import ConfigError
from dtfcli.models.cache import CACHE_NAME
from dtfcli.models.modeling_routed_mlp import RoutedCausalLM
from dtfcli.models.savings import saved_share
from dtfcli.models.stock import attention_shape, longest_text
from dtfcli.shares import measured_shares


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens to write; the end-of-text token stops earlier.
        temperature: 0 takes the likeliest token (greedy); above 0 samples from logits / temperature.
        top_p: sample from the smallest set of tokens that holds this much probability.
        top_k: sample from the k likeliest tokens only; 0: from all.
        seed: of torch's generators, so that a sample can be repeated.

    Raises:
        ConfigError: a value out of range, by option name.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, remedy in (
            ("max-new-tokens", self.max_new_tokens >= 1, "ask for 1 or more"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 is greedy, 1 samples the model's probabilities"),
            ("top-p", 0.0 < self.top_p <= 1.0, "a probability above 0 and at most 1"),
            ("top-k", self.top_k >= 0, "0 keeps all tokens, 50 the fifty likeliest"),
            ("seed", 0 <= self.seed < 2**63, "a whole number, 0 or more"),
        ):
            if not good:
                raise ConfigError(f"--{name} {getattr(self, name.replace('-', '_'))}: {remedy}.")

    def arguments(self) -> dict[str, Any]:
        """As arguments of Transformers' `generate`."""
        if self.temperature == 0.0:
            # Neutral values keep a checkpoint's own sampling settings from raising warnings in greedy decoding.
            return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True)
class GenerationStats:
    """What a continuation cost.

    Attributes:
        prefill_tokens_per_second: prompt tokens over the time to the first new token.
        decode_tokens_per_second: of the tokens after the first; None when there is one alone.
        cache_bytes: of the key/value cache at the end; None without a cache.
        dense_cache_bytes: of the dense model, for as many positions.
        routed_share: share of the tokens that routed layers took, None for dense models and for blocks without a cache.
        saved_share: share of a dense model's FLOPs that skipping left out, without attention's sums; of routed MLPs.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    cache_bytes: int | None
    dense_cache_bytes: int
    routed_share: float | None
    saved_share: float | None = None


@dataclass(frozen=True)
class Generated:
    """One continuation.

    Attributes:
        text: the continuation alone, without special tokens.
        seconds: wall time, from the first forward pass to the last token.
        stats: speed and memory, of the whole batch if there are several prompts.
    """

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    stats: GenerationStats


class _Stopwatch(StoppingCriteria):
    """Stops nothing; notes the time of each token."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _CallbackStreamer(TextStreamer):
    """Hands text over as it becomes certain (a token may end in the middle of a character)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    chat: bool = False,
    use_cache: bool = True,
    on_text: Callable[[str], None] | BaseStreamer | None = None,
) -> Generated:
    """Continue one prompt.

    Args:
        model: dense or routed, in eval mode.
        tokenizer: the model's.
        prompt: text; empty starts a new document.
        sampling: how tokens are chosen; greedy by default.
        chat: treat the prompt as a user's message and apply the tokenizer's chat template.
        use_cache: keep keys and values; False recomputes the prefix for every token.
        on_text: called with each piece of the continuation as it appears; a streamer of Transformers gets the tokens.

    Raises:
        ConfigError: the prompt does not fit the model, there is no chat template, or `topk` routing.
    """
    sampling = sampling or Sampling()
    rows = _token_rows(model, tokenizer, [prompt], sampling, chat)
    streamer = _CallbackStreamer(tokenizer, on_text) if callable(on_text) else on_text
    return _run(model, tokenizer, [(prompt, rows[0])], sampling, streamer, use_cache)[0]


def generate_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    chat: bool = False,
    use_cache: bool = True,
    batch_size: int = 8,
) -> Iterator[tuple[int, Generated]]:
    """Continue many prompts in left-padded batches; the same texts as one by one when decoding is greedy.

    Prompts of about the same length share a batch, so that little is padding. The longest come first: what does not
    fit into memory fails at once.

    Yields:
        The place of a prompt in `prompts`, and its continuation.

    Raises:
        ConfigError: as `generate`, before anything is written; or a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: at least 1 prompt at a time.")
    sampling = sampling or Sampling()
    rows = _token_rows(model, tokenizer, prompts, sampling, chat)
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = [(prompts[place], rows[place]) for place in places]
        yield from zip(places, _run(model, tokenizer, batch, sampling, None, use_cache), strict=True)


def require_causal(model: Any) -> None:
    """Raise a ConfigError for a model that cannot write: it routes by `topk`, or its MLPs by nothing yet."""
    if isinstance(model, RoutedCausalLM) and model.capacity != 1.0 and not model.is_fitted:
        raise ConfigError("the routed MLPs of this model are not fitted to text; `dtf convert` makes a fitted model.")
    if getattr(model, "routing", None) == "topk":
        raise ConfigError(
            "routing 'topk' sees the whole sequence: it cannot write one token after another. Use --routing threshold."
        )


def as_chat(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """A user's message in the tokenizer's chat template."""
    chat = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def _token_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling, chat: bool
) -> list[list[int]]:
    """Token ids of each prompt; raises ConfigError for one that the model cannot continue."""
    require_causal(model)
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError("--chat: this model's tokenizer has no chat template; leave --chat out.")
        prompts = [as_chat(tokenizer, prompt) for prompt in prompts]
    rows = [tokenizer(prompt, add_special_tokens=not chat)["input_ids"] for prompt in prompts]
    start = _start_token(tokenizer)
    if any(not row for row in rows):
        if start is None:
            raise ConfigError("the prompt is empty and the tokenizer has no token to start a text with; give a PROMPT.")
        rows = [row or [start] for row in rows]
    longest = max(map(len, rows), default=0)
    limit = longest_text(model.config)
    if longest + sampling.max_new_tokens > limit:
        raise ConfigError(
            f"the prompt has {longest} tokens and --max-new-tokens is {sampling.max_new_tokens}: together more than "
            f"the model's {limit} positions. Shorten the prompt or ask for at most {max(0, limit - longest)} new "
            "tokens."
        )
    return rows


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that starts a document, or stands between two."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[tuple[str, list[int]]],
    sampling: Sampling,
    streamer: BaseStreamer | None,
    use_cache: bool,
) -> list[Generated]:
    """Continuations of prompts with their token ids, padded on the left."""
    set_seed(sampling.seed)
    width = max(len(row) for _, row in batch)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (_start_token(tokenizer) or 0)
    ids = [[filler] * (width - len(row)) + row for _, row in batch]
    mask = [[0] * (width - len(row)) + [1] * len(row) for _, row in batch]
    stopwatch = _Stopwatch()
    # A cache of ours counts what it stores; routed MLPs have a stock one.
    watch = measured_shares(model) if isinstance(model, RoutedCausalLM) else nullcontext()
    with torch.inference_mode(), watch as meter:
        out = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            **sampling.arguments(),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=streamer,
            use_cache=use_cache,
            stopping_criteria=[stopwatch],
            return_dict_in_generate=True,
        )
    new = out.sequences[:, width:]
    started, first, *_ = stopwatch.times
    last, later = stopwatch.times[-1], new.numel() - len(new)
    cache = out.get(CACHE_NAME)
    shares = list(getattr(cache, "routed_shares", {}).values() if meter is None else meter.read().by_layer.values())
    stats = GenerationStats(
        prefill_tokens_per_second=sum(len(row) for _, row in batch) / (first - started),
        decode_tokens_per_second=later / (last - first) if later else None,
        cache_bytes=cache_bytes(cache) if use_cache else None,
        dense_cache_bytes=(
            dense_cache_bytes(model, out.sequences.numel() - len(new))
            if cache is None or hasattr(cache, "nbytes")
            else cache_bytes(cache)  # a stock one
        ),
        routed_share=sum(shares) / len(shares) if shares else None,
        saved_share=saved_share(model, shares) if isinstance(model, RoutedCausalLM) else None,
    )
    results = []
    for (prompt, row), written in zip(batch, new.tolist(), strict=True):
        end = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else len(written)
        text = str(tokenizer.decode(written[:end], skip_special_tokens=True))
        results.append(Generated(prompt, text, len(row), end, last - started, stats))
    return results


def cache_bytes(cache: Any) -> int:
    """Bytes of a key/value cache, ours or Transformers'."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    parts = [part for layer in cache.layers for part in vars(layer).values()]
    parts += [inner for part in parts if isinstance(part, dict) for inner in part.values()]  # of linear attention
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def dense_cache_bytes(model: Any, positions: int) -> int:
    """Bytes of the keys and values of every layer, for a number of positions."""
    config = model.config
    _, heads, head_size = attention_shape(config)
    numbers = 2 * config.num_hidden_layers * heads * head_size * positions
    return numbers * model.dtype.itemsize
