"""Shapes and licenses of base models, so that a dry run answers without a network.

Copied from the config.json of each model on the Hub; training reads the Hub's own file, never these.
"""

import re
from typing import Any

BASE_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
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
