"""`model.*`: the base model and its routing.

The architecture's hyper-parameters are not repeated here. They come from `RoutingFields`, which the models'
config classes inherit.
"""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, Field, create_model, model_validator

from dtfcli.models.configuration_fields import RoutingFields, check_field, check_fields
from dtfcli.models.families import FAMILIES
from dtfcli.settings.group import Count, Group, require
from dtfcli.settings.resolve import ROUTING_NAMES

Architecture = Literal["dtf", "mod", "random", "layerdrop", "dense"]

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]


class ScratchSettings(Group):
    """`model.scratch.*`: the backbone's shape when there is no base model."""

    family: FamilyName = Field("llama", description="Which backbone to build.")
    hidden_size: Count = Field(256, description="Width of the residual stream, D.")
    intermediate_size: Count = Field(704, description="Width of the feed-forward blocks.")
    num_hidden_layers: Count = Field(6, description="Decoder layers.")
    num_attention_heads: Count = Field(4, description="Query heads.")
    num_key_value_heads: Count = Field(2, description="Key and value heads (grouped-query attention).")
    vocab_size: Count = Field(4096, ge=300, description="Vocabulary, also that of the tokenizer trained for it.")
    max_position_embeddings: Count = Field(2048, description="Longest sequence.")
    tie_word_embeddings: bool = Field(True, description="Share the input embeddings with the output layer.")
    rope_theta: Annotated[float, Field(gt=0)] = Field(10000.0, description="Base of the rotary positions.")

    @model_validator(mode="after")
    def _check_shape(self) -> "ScratchSettings":
        heads, size, shared = self.num_attention_heads, self.hidden_size, self.num_key_value_heads
        even = f"rotary positions need an even size for each of the {heads} heads; take a multiple of {2 * heads}"
        require(size % (2 * heads) == 0, "hidden_size", size, even)
        require(heads % shared == 0, "num_key_value_heads", shared, f"must divide num_attention_heads = {heads}")
        return self


_HINTS = get_type_hints(RoutingFields)
# Each field is checked by itself, too, so that a mistake elsewhere does not hide one in it.
_ROUTING: dict[str, Any] = {
    name: (
        Annotated[_HINTS[name] | None, AfterValidator(partial(check_field, name))],
        Field(None, description=RoutingFields.__dataclass_fields__[name].metadata["help"]),
    )
    for name in ROUTING_NAMES
}
RoutingGroup = create_model("RoutingGroup", __base__=Group, **_ROUTING)
"""A group with every field of `RoutingFields`; unset (None) means the config class's own default."""


class ModelSettings(RoutingGroup):
    """`model.*`: the base model and its routing."""

    architecture: Architecture = Field(
        "dtf",
        description="dtf (a score of what skipping loses), mod (Mixture-of-Depths), dense (the stock model), or a "
        "control: random (a fixed random score), layerdrop (routed layers kept or left out whole).",
    )
    base: str = Field("", description="Hub id, model folder or .gguf file to start from; empty: from scratch.")
    revision: str = Field("", description="Branch, tag or commit of a Hub base; empty: its default branch.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention kernel; flash_attention_2 needs a GPU and the flash-attn package."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the base model.")
    scratch: ScratchSettings = Field(default_factory=ScratchSettings, description="Shape of a model from scratch.")

    @model_validator(mode="after")
    def _check_routing(self) -> "ModelSettings":
        if self.architecture == "dense":
            return self
        fields = self.routing_fields()
        unmasked = self.attn_implementation == "flash_attention_2" and fields.get("routed_part") != "mlp"
        remedy = "explored tokens need masks that flash_attention_2 lacks; use model.attn_implementation = 'sdpa'"
        require(not (fields.get("explore") and unmasked), "explore", fields.get("explore"), remedy)
        layers = None if self.base else self.scratch.num_hidden_layers
        check_fields({"architecture": self.architecture, **fields}, layers)
        return self

    def routing_fields(self) -> dict[str, Any]:
        """The routing fields that are set; the others keep the config class's defaults."""
        values = {name: getattr(self, name) for name in ROUTING_NAMES}
        return {name: value for name, value in values.items() if value is not None}
