"""Shapes and licenses of base models, so that a dry run answers without a network.

Copied from the config.json of each model on the Hub; training reads the Hub's own file, never these.
"""

import re
from typing import Any

_NAMES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "tie_word_embeddings"),
)


def _config(*values: Any) -> dict[str, Any]:
    """A configuration; `values` in the order of `_NAMES`."""
    return dict(zip(_NAMES, values, strict=True))


_END, _LONG = (151643, 151643), 131072
BASE_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _config("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, 1e6, 1e-6, *_END, True),
    "Qwen/Qwen2.5-1.5B": _config("qwen2", 1536, 8960, 28, 12, 2, 151936, _LONG, 1e6, 1e-6, *_END, True),
    "Qwen/Qwen2.5-7B": _config("qwen2", 3584, 18944, 28, 28, 4, 152064, _LONG, 1e6, 1e-6, *_END, False),
    "HuggingFaceTB/SmolLM2-135M": _config("llama", 576, 1536, 30, 9, 3, 49152, 8192, 1e5, 1e-5, 0, 0, True),
}

_APACHE = re.compile(
    r"Qwen/Qwen2\.5-(0\.5|1\.5|7|14|32)B(-Instruct)?|HuggingFaceTB/SmolLM2-(135M|360M|1\.7B)(-Instruct)?"
    r"|TinyLlama/TinyLlama-1\.1B-.*|Qwen/Qwen3-(0\.6|1\.7|4|8|14)B(-Base)?|HuggingFaceTB/SmolLM3-3B(-Base)?"
)


def base_license(base: str | None) -> str | None:
    """The Hub's identifier of the license of a base model that is known here; its fine-tunes inherit it."""
    return "apache-2.0" if base and _APACHE.fullmatch(base) else None
