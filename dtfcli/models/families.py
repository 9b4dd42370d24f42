"""The backbones, one row each. CONTRIBUTING.md says how to add one.

The classes are made of these rows: configurations in `configuration_dynamic`, layers and models in `modeling_dynamic`.
This file needs neither torch nor Transformers until a stock class is asked for, so that settings can name the rows.
"""

from typing import Any, NamedTuple


class Family(NamedTuple):
    """A backbone: its names, and in what its layer differs from Llama's.

    Windows, norms of queries and keys, layers without positions and scaled sums are read off the stock parts.
    """

    stock: str
    """What Transformers' class names begin with: "Qwen2" as in `Qwen2DecoderLayer`."""
    ours: str = ""
    """What our class names have in its place, if it is not the same: "Qwen" as in `DynamicQwenForCausalLM`."""
    text: str = ""
    """What the configuration and the stack have after it: "Text" as in `Gemma3TextConfig`."""
    first_norm: str | None = "input_layernorm"
    """Name of the norm before attention; None: there is none."""
    rotary_by_kind: bool = False
    """Whether rotary embeddings differ with the kind of attention."""

    eps: str = "rms_norm_eps"
    """What the configuration calls the ε of its norms; `norm_eps` reads it."""

    @property
    def name(self) -> str:
        """What our class names are made of."""
        return self.ours or self.stock

    @property
    def dense_config(self) -> type[Any]:
        """The stock configuration."""
        return self._stock_class(f"{self.stock}{self.text}Config")

    @property
    def dense_model(self) -> type[Any]:
        """The stock language model."""
        return self._stock_class(f"{self.stock}ForCausalLM")

    @property
    def dense_stack(self) -> type[Any]:
        """The stock model without a head."""
        return self._stock_class(f"{self.stock}{self.text}Model")

    def _stock_class(self, name: str) -> type[Any]:
        import transformers

        return getattr(transformers, name)


FAMILIES: dict[str, Family] = {
    "gemma3_text": Family("Gemma3", text="Text", rotary_by_kind=True),
    "granite": Family("Granite"),
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "olmo2": Family("Olmo2", first_norm=None),
    "qwen2": Family("Qwen2", ours="Qwen"),
    "qwen3": Family("Qwen3"),
    "smollm3": Family("SmolLM3"),
}
"""By the model type of the dense configuration; the routed one's is "dynamic_" before it."""
