"""Shapes and licenses of base models, so that a dry run answers without a network.

Copied from the config.json of each model on the Hub; training reads the Hub's own file, never these.
"""

import re
from typing import Any

_QWEN2_5: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_LONG = {"max_position_embeddings": 131072}
_LARGE = _LONG | {"vocab_size": 152064, "tie_word_embeddings": False}


def _qwen2_5(
    hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **others: float | bool
) -> dict[str, Any]:
    """A Qwen2.5 base model; `heads`: of queries, and of keys and values."""
    shape = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    }
    return _QWEN2_5 | shape | others


BASE_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _qwen2_5(896, 4864, 24, (14, 2)),
    "Qwen/Qwen2.5-1.5B": _qwen2_5(1536, 8960, 28, (12, 2), **_LONG),
    "Qwen/Qwen2.5-3B": _qwen2_5(2048, 11008, 36, (16, 2)),
    "Qwen/Qwen2.5-7B": _qwen2_5(3584, 18944, 28, (28, 4), **_LARGE),
    "Qwen/Qwen2.5-14B": _qwen2_5(5120, 13824, 48, (40, 8), **_LARGE, rms_norm_eps=1e-5),
    "Qwen/Qwen2.5-32B": _qwen2_5(5120, 27648, 64, (40, 8), **_LARGE, rms_norm_eps=1e-5),
    "Qwen/Qwen2.5-72B": _qwen2_5(8192, 29568, 80, (64, 8), **_LARGE, rms_norm_eps=1e-5),
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
    "Qwen/Qwen3-0.6B-Base": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "HuggingFaceTB/SmolLM3-3B-Base": {
        "model_type": "smollm3",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 128256,
        "max_position_embeddings": 65536,
        "rope_theta": 5000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}

_APACHE = re.compile(
    r"Qwen/Qwen2\.5-(0\.5|1\.5|7|14|32)B(-Instruct)?|HuggingFaceTB/SmolLM2-(135M|360M|1\.7B)(-Instruct)?"
    r"|TinyLlama/TinyLlama-1\.1B-.*|Qwen/Qwen3-(0\.6|1\.7|4|8|14)B(-Base)?|HuggingFaceTB/SmolLM3-3B(-Base)?"
)


def base_license(base: str | None) -> str | None:
    """The Hub's identifier of the license of a base model that is known here; its fine-tunes inherit it."""
    return "apache-2.0" if base and _APACHE.fullmatch(base) else None
