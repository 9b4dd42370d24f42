"""`data.*`: the text to train on."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from dtfcli.settings.group import Count, Group, Share, require, whole


class Source(Group):
    """One entry of `data.sources`."""

    path: str = Field(
        min_length=1,
        description="Hub id, folder or file (.txt .md .py .jsonl .parquet), or python-stdlib: the interpreter's own.",
    )
    name: str = Field("", description="Configuration of a Hub dataset.")
    split: str = Field("train", min_length=1, description="Split of a Hub dataset.")
    text_field: str = Field("text", min_length=1, description="Column or key that holds the text.")
    ratio: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Share of the documents kept.")
    messages_field: str = Field(
        "", description="Column of conversations, lists of {role, content}, to train on instead of a text_field."
    )
    control_tokens: bool = Field(
        False,
        description="Read `<|im_start|>` and the like in the text as control tokens: for text in a chat template.",
    )
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Relative rate of drawing documents from this source when streaming."
    )
    streaming: bool = Field(False, description="Read the source while training, not before; all sources or none.")

    @classmethod
    def named(cls, text: str, **fields: Any) -> "Source":
        """Of a file, a folder, python-stdlib, or OWNER/NAME or OWNER/NAME:CONFIG on the Hub."""
        configured = re.fullmatch(r"([\w.-]+/[\w.-]+):([\w.-]+)", text)
        path, name = configured.groups() if configured else (text, "")
        return cls(path=path, name=name, **fields)

    @model_validator(mode="after")
    def _check_reading(self) -> "Source":
        remedy = "only streaming reads it; use ratio to keep a share, or set streaming=true"
        require(self.streaming or self.weight is None, "weight", self.weight, remedy)
        remedy = f"nothing reads it, since messages_field = {self.messages_field} is set; leave one of them out"
        require(not self.messages_field or self.text_field == "text", "text_field", self.text_field, remedy)
        require(not (self.messages_field and self.control_tokens), "control_tokens", self.control_tokens, remedy)
        return self


class DataSettings(Group):
    """`data.*`: the text to train on."""

    sources: list[Source] = Field(
        default_factory=lambda: [Source(path="python-stdlib")],
        min_length=1,
        description="Where documents come from.",
        examples=['[{path = "novels.parquet"}]'],
    )
    seq_len: Annotated[int, BeforeValidator(whole), Field(ge=8)] = Field(1024, description="Tokens per sequence.")
    validation_fraction: Share = Field(0.01, description="Share of the documents held out; 0: no validation.")
    validation_blocks: Count = Field(64, description="Held-out sequences used for each evaluation.")
    tokenizer: str = Field("", description="Hub id or folder; empty: the base model's, or one trained on the data.")
    max_documents: Count | None = Field(
        None, description="Read at most this many, from the sources in turns; unset: all."
    )
    cache_dir: str = Field("", description="Where tokenized text is kept; empty: ~/.cache/dtf/tokens.")
    shuffle_buffer: Count = Field(1000, description="Documents of each source shuffled together when streaming.")

    @property
    def streaming(self) -> bool:
        """Whether the sources are read while training."""
        return any(source.streaming for source in self.sources)

    @model_validator(mode="after")
    def _check_sources(self) -> "DataSettings":
        weighted = any(source.weight is not None for source in self.sources)
        for index, source in enumerate(self.sources):
            remedy = "other sources stream, and all do or none; set it for each of them"
            require(source.streaming == self.streaming, f"sources[{index}].streaming", source.streaming, remedy)
            if weighted and source.weight is None:
                remedy = "other sources have a weight; give every source one, or none"
                raise ValueError(f"sources[{index}].weight = unset: {remedy}")
        return self
