"""The backbones: a section each, of stock classes with ours in front.

A section says which layer, stack, language model and configuration it takes, and in what it differs from Llama: the
norms of its layer, rotary embeddings that differ from layer to layer. Windows, norms of queries and keys, layers
without positions and scaled sums are read off the stock parts. docs/architecture.md says how to add one.
"""

from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM, Gemma3TextModel
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteForCausalLM, GraniteModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer, Olmo2ForCausalLM, Olmo2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3ForCausalLM, SmolLM3Model

from .causal_lm import DynamicCausalLMMixin
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
from .layers import DecisionLayerMixin, RoutedLayerMixin
from .stack import DynamicModelMixin


class DecisionLlamaLayer(DecisionLayerMixin, LlamaDecoderLayer):
    """Decision layer of a Llama-type (SmolLM2 among them) backbone."""


class RoutedLlamaLayer(RoutedLayerMixin, LlamaDecoderLayer):
    """Routed layer of a Llama-type (SmolLM2 among them) backbone."""


class DynamicLlamaModel(DynamicModelMixin, LlamaModel):
    """Routed stack of a Llama-type (SmolLM2 among them) model."""

    config_class = DynamicLlamaConfig
    decision_layer_class = DecisionLlamaLayer
    routed_layer_class = RoutedLlamaLayer
    _no_split_modules = ["LlamaDecoderLayer", "DecisionLlamaLayer", "RoutedLlamaLayer"]  # noqa: RUF012


class DynamicLlamaForCausalLM(DynamicCausalLMMixin, LlamaForCausalLM):
    """Routed Llama-type (SmolLM2 among them) language model."""

    config_class = DynamicLlamaConfig
    stack_class = DynamicLlamaModel
    _no_split_modules = DynamicLlamaModel._no_split_modules


class DecisionQwenLayer(DecisionLayerMixin, Qwen2DecoderLayer):
    """Decision layer of a Qwen2 (2.5) backbone."""


class RoutedQwenLayer(RoutedLayerMixin, Qwen2DecoderLayer):
    """Routed layer of a Qwen2 (2.5) backbone."""


class DynamicQwenModel(DynamicModelMixin, Qwen2Model):
    """Routed stack of a Qwen2 (2.5) model."""

    config_class = DynamicQwenConfig
    decision_layer_class = DecisionQwenLayer
    routed_layer_class = RoutedQwenLayer
    _no_split_modules = ["Qwen2DecoderLayer", "DecisionQwenLayer", "RoutedQwenLayer"]  # noqa: RUF012


class DynamicQwenForCausalLM(DynamicCausalLMMixin, Qwen2ForCausalLM):
    """Routed Qwen2 (2.5) language model."""

    config_class = DynamicQwenConfig
    stack_class = DynamicQwenModel
    _no_split_modules = DynamicQwenModel._no_split_modules


class DecisionQwen3Layer(DecisionLayerMixin, Qwen3DecoderLayer):
    """Decision layer of a Qwen3 backbone."""


class RoutedQwen3Layer(RoutedLayerMixin, Qwen3DecoderLayer):
    """Routed layer of a Qwen3 backbone."""


class DynamicQwen3Model(DynamicModelMixin, Qwen3Model):
    """Routed stack of a Qwen3 model."""

    config_class = DynamicQwen3Config
    decision_layer_class = DecisionQwen3Layer
    routed_layer_class = RoutedQwen3Layer
    _no_split_modules = ["Qwen3DecoderLayer", "DecisionQwen3Layer", "RoutedQwen3Layer"]  # noqa: RUF012


class DynamicQwen3ForCausalLM(DynamicCausalLMMixin, Qwen3ForCausalLM):
    """Routed Qwen3 language model."""

    config_class = DynamicQwen3Config
    stack_class = DynamicQwen3Model
    _no_split_modules = DynamicQwen3Model._no_split_modules


class DecisionMistralLayer(DecisionLayerMixin, MistralDecoderLayer):
    """Decision layer of a Mistral backbone."""


class RoutedMistralLayer(RoutedLayerMixin, MistralDecoderLayer):
    """Routed layer of a Mistral backbone."""


class DynamicMistralModel(DynamicModelMixin, MistralModel):
    """Routed stack of a Mistral model."""

    config_class = DynamicMistralConfig
    decision_layer_class = DecisionMistralLayer
    routed_layer_class = RoutedMistralLayer
    _no_split_modules = ["MistralDecoderLayer", "DecisionMistralLayer", "RoutedMistralLayer"]  # noqa: RUF012


class DynamicMistralForCausalLM(DynamicCausalLMMixin, MistralForCausalLM):
    """Routed Mistral language model."""

    config_class = DynamicMistralConfig
    stack_class = DynamicMistralModel
    _no_split_modules = DynamicMistralModel._no_split_modules


class DecisionSmolLM3Layer(DecisionLayerMixin, SmolLM3DecoderLayer):
    """Decision layer of a SmolLM3 backbone."""


class RoutedSmolLM3Layer(RoutedLayerMixin, SmolLM3DecoderLayer):
    """Routed layer of a SmolLM3 backbone."""


class DynamicSmolLM3Model(DynamicModelMixin, SmolLM3Model):
    """Routed stack of a SmolLM3 model."""

    config_class = DynamicSmolLM3Config
    decision_layer_class = DecisionSmolLM3Layer
    routed_layer_class = RoutedSmolLM3Layer
    _no_split_modules = ["SmolLM3DecoderLayer", "DecisionSmolLM3Layer", "RoutedSmolLM3Layer"]  # noqa: RUF012


class DynamicSmolLM3ForCausalLM(DynamicCausalLMMixin, SmolLM3ForCausalLM):
    """Routed SmolLM3 language model."""

    config_class = DynamicSmolLM3Config
    stack_class = DynamicSmolLM3Model
    _no_split_modules = DynamicSmolLM3Model._no_split_modules


class DecisionGraniteLayer(DecisionLayerMixin, GraniteDecoderLayer):
    """Decision layer of a Granite backbone."""


class RoutedGraniteLayer(RoutedLayerMixin, GraniteDecoderLayer):
    """Routed layer of a Granite backbone."""


class DynamicGraniteModel(DynamicModelMixin, GraniteModel):
    """Routed stack of a Granite model."""

    config_class = DynamicGraniteConfig
    decision_layer_class = DecisionGraniteLayer
    routed_layer_class = RoutedGraniteLayer
    _no_split_modules = ["GraniteDecoderLayer", "DecisionGraniteLayer", "RoutedGraniteLayer"]  # noqa: RUF012


class DynamicGraniteForCausalLM(DynamicCausalLMMixin, GraniteForCausalLM):
    """Routed Granite language model."""

    config_class = DynamicGraniteConfig
    stack_class = DynamicGraniteModel
    _no_split_modules = DynamicGraniteModel._no_split_modules


class DecisionOlmo2Layer(DecisionLayerMixin, Olmo2DecoderLayer):
    """Decision layer of a OLMo 2 backbone."""


class RoutedOlmo2Layer(RoutedLayerMixin, Olmo2DecoderLayer):
    """Routed layer of a OLMo 2 backbone."""

    norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")


class DynamicOlmo2Model(DynamicModelMixin, Olmo2Model):
    """Routed stack of a OLMo 2 model."""

    config_class = DynamicOlmo2Config
    decision_layer_class = DecisionOlmo2Layer
    routed_layer_class = RoutedOlmo2Layer
    _no_split_modules = ["Olmo2DecoderLayer", "DecisionOlmo2Layer", "RoutedOlmo2Layer"]  # noqa: RUF012


class DynamicOlmo2ForCausalLM(DynamicCausalLMMixin, Olmo2ForCausalLM):
    """Routed OLMo 2 language model."""

    config_class = DynamicOlmo2Config
    stack_class = DynamicOlmo2Model
    _no_split_modules = DynamicOlmo2Model._no_split_modules


class DecisionGemma3Layer(DecisionLayerMixin, Gemma3DecoderLayer):
    """Decision layer of a Gemma 3 (text) backbone."""


class RoutedGemma3Layer(RoutedLayerMixin, Gemma3DecoderLayer):
    """Routed layer of a Gemma 3 (text) backbone."""

    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )


class DynamicGemma3Model(DynamicModelMixin, Gemma3TextModel):
    """Routed stack of a Gemma 3 (text) model."""

    config_class = DynamicGemma3Config
    decision_layer_class = DecisionGemma3Layer
    routed_layer_class = RoutedGemma3Layer
    rotary_by_kind = True
    _no_split_modules = ["Gemma3DecoderLayer", "DecisionGemma3Layer", "RoutedGemma3Layer"]  # noqa: RUF012


class DynamicGemma3ForCausalLM(DynamicCausalLMMixin, Gemma3ForCausalLM):
    """Routed Gemma 3 (text) language model."""

    config_class = DynamicGemma3Config
    stack_class = DynamicGemma3Model
    _no_split_modules = DynamicGemma3Model._no_split_modules


# Saving copies these files beside the weights and names the classes in `auto_map`.
for _model_class in (
    DynamicLlamaForCausalLM,
    DynamicQwenForCausalLM,
    DynamicQwen3ForCausalLM,
    DynamicMistralForCausalLM,
    DynamicSmolLM3ForCausalLM,
    DynamicGraniteForCausalLM,
    DynamicOlmo2ForCausalLM,
    DynamicGemma3ForCausalLM,
):
    _model_class.config_class.register_for_auto_class()
    _model_class.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "DynamicGemma3ForCausalLM",
    "DynamicGemma3Model",
    "DynamicGraniteForCausalLM",
    "DynamicGraniteModel",
    "DynamicLlamaForCausalLM",
    "DynamicLlamaModel",
    "DynamicMistralForCausalLM",
    "DynamicMistralModel",
    "DynamicOlmo2ForCausalLM",
    "DynamicOlmo2Model",
    "DynamicQwen3ForCausalLM",
    "DynamicQwen3Model",
    "DynamicQwenForCausalLM",
    "DynamicQwenModel",
    "DynamicSmolLM3ForCausalLM",
    "DynamicSmolLM3Model",
]
