"""Shapes and licenses of base models, so that a dry run answers without a network.

Copied from the config.json of each model on the Hub; training reads the Hub's own file, never these.
"""

import re
from typing import Any


def _qwen2_5(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    longest: int,
    eps: float,
    tied: bool,
) -> dict[str, Any]:
    """A Qwen2.5 base model; `heads` are those of queries, and of keys and values."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": longest,
        "rope_theta": 1000000.0,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }


BASE_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _qwen2_5(
        hidden=896, intermediate=4864, layers=24, heads=(14, 2), vocabulary=151936, longest=32768, eps=1e-6, tied=True
    ),
    "Qwen/Qwen2.5-1.5B": _qwen2_5(
        hidden=1536, intermediate=8960, layers=28, heads=(12, 2), vocabulary=151936, longest=131072, eps=1e-6, tied=True
    ),
    "Qwen/Qwen2.5-3B": _qwen2_5(
        hidden=2048, intermediate=11008, layers=36, heads=(16, 2), vocabulary=151936, longest=32768, eps=1e-6, tied=True
    ),
    "Qwen/Qwen2.5-7B": _qwen2_5(
        hidden=3584,
        intermediate=18944,
        layers=28,
        heads=(28, 4),
        vocabulary=152064,
        longest=131072,
        eps=1e-6,
        tied=False,
    ),
    "Qwen/Qwen2.5-14B": _qwen2_5(
        hidden=5120,
        intermediate=13824,
        layers=48,
        heads=(40, 8),
        vocabulary=152064,
        longest=131072,
        eps=1e-5,
        tied=False,
    ),
    "Qwen/Qwen2.5-32B": _qwen2_5(
        hidden=5120,
        intermediate=27648,
        layers=64,
        heads=(40, 8),
        vocabulary=152064,
        longest=131072,
        eps=1e-5,
        tied=False,
    ),
    "Qwen/Qwen2.5-72B": _qwen2_5(
        hidden=8192,
        intermediate=29568,
        layers=80,
        heads=(64, 8),
        vocabulary=152064,
        longest=131072,
        eps=1e-5,
        tied=False,
    ),
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}

_APACHE = re.compile(
    r"Qwen/Qwen2\.5-(0\.5|1\.5|7|14|32)B(-Instruct)?|HuggingFaceTB/SmolLM2-(135M|360M|1\.7B)(-Instruct)?"
    r"|TinyLlama/TinyLlama-1\.1B-.*"
)


def base_license(base: str | None) -> str | None:
    """The Hub's identifier of the license of a base model that is known here; its fine-tunes inherit it."""
    return "apache-2.0" if base and _APACHE.fullmatch(base) else None
