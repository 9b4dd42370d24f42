"""The backbones: for each model type of Transformers, the stock classes and the routed ones.

Whoever has to know which backbones there are reads this table: conversion, loading, registration, kernels.
"""

from typing import Any, NamedTuple

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from .configuration_dynamic import (
    DynamicGemma3Config,
    DynamicGraniteConfig,
    DynamicLlamaConfig,
    DynamicMistralConfig,
    DynamicOlmo2Config,
    DynamicQwen3Config,
    DynamicQwenConfig,
    DynamicSmolLM3Config,
)
from .modeling_dynamic import (
    DynamicGemma3ForCausalLM,
    DynamicGraniteForCausalLM,
    DynamicLlamaForCausalLM,
    DynamicMistralForCausalLM,
    DynamicOlmo2ForCausalLM,
    DynamicQwen3ForCausalLM,
    DynamicQwenForCausalLM,
    DynamicSmolLM3ForCausalLM,
)


class Family(NamedTuple):
    """One backbone."""

    dense_config: type[Any]
    dense_model: type[Any]
    routed_config: type[Any]
    routed_model: type[Any]


FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(Gemma3TextConfig, Gemma3ForCausalLM, DynamicGemma3Config, DynamicGemma3ForCausalLM),
    "granite": Family(GraniteConfig, GraniteForCausalLM, DynamicGraniteConfig, DynamicGraniteForCausalLM),
    "llama": Family(LlamaConfig, LlamaForCausalLM, DynamicLlamaConfig, DynamicLlamaForCausalLM),
    "mistral": Family(MistralConfig, MistralForCausalLM, DynamicMistralConfig, DynamicMistralForCausalLM),
    "olmo2": Family(Olmo2Config, Olmo2ForCausalLM, DynamicOlmo2Config, DynamicOlmo2ForCausalLM),
    "qwen2": Family(Qwen2Config, Qwen2ForCausalLM, DynamicQwenConfig, DynamicQwenForCausalLM),
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM, DynamicQwen3Config, DynamicQwen3ForCausalLM),
    "smollm3": Family(SmolLM3Config, SmolLM3ForCausalLM, DynamicSmolLM3Config, DynamicSmolLM3ForCausalLM),
}
"""By the model type of the dense configuration; the routed one's is "dynamic_" before it."""
