"""The backbones: for each model type of Transformers, the stock classes and the routed ones.

Whoever has to know which backbones there are reads this table: conversion, loading, registration, kernels.
"""

from typing import Any, NamedTuple

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from .configuration_dynamic import DynamicLlamaConfig, DynamicQwenConfig
from .modeling_dynamic import DynamicLlamaForCausalLM, DynamicQwenForCausalLM


class Family(NamedTuple):
    """One backbone."""

    dense_config: type[Any]
    dense_model: type[Any]
    routed_config: type[Any]
    routed_model: type[Any]


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaConfig, LlamaForCausalLM, DynamicLlamaConfig, DynamicLlamaForCausalLM),
    "qwen2": Family(Qwen2Config, Qwen2ForCausalLM, DynamicQwenConfig, DynamicQwenForCausalLM),
}
"""By the model type of the dense configuration; the routed one's is "dynamic_" before it."""
