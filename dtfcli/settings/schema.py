"""The one schema of a run, and how its values are gathered.

`load_settings` lays the sources over each other, highest first: overrides, environment (DTF_…), a TOML file, a preset,
the defaults of the groups. Unknown keys, wrong types and settings that nothing reads are refused with the key, the
value and the remedy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dtfcli.errors import ConfigError
from dtfcli.settings.after import EvalSettings, HubSettings
from dtfcli.settings.data import DataSettings
from dtfcli.settings.group import require
from dtfcli.settings.model import ModelSettings
from dtfcli.settings.resolve import Sources, resolve, unread_keys
from dtfcli.settings.run import LoggingSettings, RunSettings
from dtfcli.settings.sources import remove
from dtfcli.settings.training import DistillSettings, LoraSettings, TrainingSettings

SHOWN_PROBLEMS = 3


class Settings(BaseSettings):
    """All settings of a run; `load_settings` makes one."""

    model_config = SettingsConfigDict(extra="forbid", strict=True, frozen=True)

    run: RunSettings = Field(default_factory=RunSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    distill: DistillSettings = Field(default_factory=DistillSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    eval: EvalSettings = Field(default_factory=EvalSettings)
    hub: HubSettings = Field(default_factory=HubSettings)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments alone: `load_settings` gathers the other sources itself, to know where each value came from."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_across(self) -> "Settings":
        longest, length = self.model.scratch.max_position_embeddings, self.data.seq_len
        remedy = f"a model of model.scratch.max_position_embeddings = {longest} takes no more; change one of the two"
        require(bool(self.model.base) or length <= longest, "data.seq_len", length, remedy)
        if self.data.streaming and self.training.max_steps is None:
            remedy = "data.sources stream, and a stream has no end; set it, such as training.max_steps=1000"
            raise ValueError(f"training.max_steps = unset: {remedy}")
        for name, group, why in (
            ("lora", self.lora, "random weights are not saved with an adapter"),
            ("distill", self.distill, "a model from scratch has no dense parent"),
        ):
            remedy = f"{why}; set model.base to a pretrained model"
            require(not group.enabled or bool(self.model.base), f"{name}.enabled", True, remedy)
        whole = self.lora.quantize == "none" or self.training.sharding != "fsdp2"
        remedy = "fsdp2 cannot spread weights in 4 bits; leave training.sharding at ddp, or lora.quantize at none"
        require(whole, "lora.quantize", self.lora.quantize, remedy)
        self.accumulation_steps()
        return self

    @property
    def tokens_per_update(self) -> int:
        """Tokens per optimizer step, over all processes."""
        return self.training.tokens_per_update or self.training.micro_batch_size * self.data.seq_len

    @property
    def shares_parent(self) -> bool:
        """Whether a dense parent is made of the model's own tensors, which stay frozen and as they are."""
        return self.lora.enabled and self.lora.quantize == "none"

    def accumulation_steps(self, processes: int = 1) -> int:
        """Micro-batches per optimizer step on each process.

        Raises:
            ValueError: tokens_per_update is no multiple of the processes' micro-batches.
        """
        micro, length = self.training.micro_batch_size, self.data.seq_len
        unit = micro * length * processes
        tokens = self.tokens_per_update
        if tokens % unit == 0:
            return tokens // unit
        below, above = tokens // unit * unit, (tokens // unit + 1) * unit
        nearest = f"the nearest are {below} and {above}" if below else f"the smallest is {unit}"
        names, numbers = "training.micro_batch_size × data.seq_len", f"{micro} × {length}"
        if processes > 1:
            names, numbers = f"{names} × processes", f"{numbers} × {processes}"
        remedy = f"must be a multiple of {names} = {numbers} = {unit}; {nearest}"
        rows, left = divmod(tokens, length * processes)
        if left == 0 and rows < micro:
            remedy += f", or set training.micro_batch_size={rows}"
        raise ValueError(f"training.tokens_per_update = {tokens}: {remedy}")

    def to_toml(self) -> str:
        """The settings that are set and read, as TOML that `--config` takes."""
        values = self.model_dump(exclude_none=True)
        for key in unread_keys(values):
            remove(values, key)
        return tomlkit.dumps(values)


def load_settings(preset: str | None = None, overrides: Sequence[str] = (), config: Path | None = None) -> Settings:
    """Resolve the settings of a run.

    Args:
        preset: name of a preset; without one and without `config`, `<architecture>-qwen2.5-0.5b`.
        overrides: `KEY=VALUE` strings such as `training.max_steps=200` or `model=mod`.
        config: a TOML file laid over the preset.

    Raises:
        ConfigError: anything in them is wrong; the message has a line for each of the first few mistakes.
    """
    settings, lines = resolve(Settings, Sources(Settings, preset, overrides, Path(config) if config else None))
    if settings is None:
        hidden = len(lines) - SHOWN_PROBLEMS
        more = [f"… and {hidden} more."] if hidden > 0 else []
        raise ConfigError("\n".join([*lines[:SHOWN_PROBLEMS], *more]))
    return settings


def file_problems(config: Path) -> list[str]:
    """Every mistake in a settings file, one line each; an empty list when it is right.

    Raises:
        ConfigError: it cannot be read.
    """
    return resolve(Settings, Sources(Settings, None, (), config))[1]
