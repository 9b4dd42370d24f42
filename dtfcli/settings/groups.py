"""The one schema of a run: every setting, its type, its default and what it means.

`load_settings` gathers the layers, highest first: overrides, environment (DTF_…), a TOML file, a preset, the
defaults below. Unknown keys, wrong types and settings that nothing reads are refused with the key, the value
and the remedy. The architecture's hyper-parameters are not repeated here: `model.*` takes them from
`RoutingFields`, where the config classes of the models take them too.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tomlkit
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dtfcli.errors import ConfigError
from dtfcli.models.configuration_fields import RoutingFields, check_routing_fields
from dtfcli.settings import describe
from dtfcli.settings.layers import ROUTING_NAMES, Layers, resolve, unread_keys
from dtfcli.settings.overrides import remove

SHOWN_PROBLEMS = 3


def _whole(value: Any) -> Any:
    """Let 1e6 stand for 1000000 where a whole number is wanted."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require(condition: bool, name: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {describe.show_value(value)}: {remedy}")


def _check_name(name: str) -> str:
    _require(
        bool(re.fullmatch(r"[\w][\w .+@=-]*", name)) and not name.endswith((" ", ".")) and len(name) <= 100,
        "name",
        name,
        "it becomes a folder; use letters, digits and . _ - and at most 100 of them",
    )
    return name


def _check_device(device: str) -> str:
    known = re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d+)?", device)
    _require(bool(known), "device", device, "choose auto, cpu, mps, xpu, cuda or a numbered one such as cuda:0")
    return device


def _check_repo(repo: str) -> str:
    part = r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?"
    known = not repo or (re.fullmatch(rf"{part}(/{part})?", repo, re.ASCII) and not repo.endswith(".git"))
    _require(bool(known) and len(repo) <= 96, "repo", repo, "a Hub id is owner/name or a name, such as me/my-model")
    return repo


def _check_betas(betas: list[float]) -> list[float]:
    _require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "betas",
        betas,
        "AdamW takes two numbers from 0 up to, but not, 1, such as [0.9, 0.95]",
    )
    return betas


def _check_targets(targets: list[str]) -> list[str]:
    unknown = [name for name in targets if name not in LORA_TARGETS]
    _require(
        not unknown,
        "targets",
        targets,
        f"{', '.join(unknown)} is no projection of the backbone; choose from {', '.join(LORA_TARGETS)}",
    )
    return targets


def _check_routing_field(name: str, value: Any) -> Any:
    if value is not None:
        check_routing_fields({name: value})
    return value


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a backbone block. Routers, priors and predictors are trained in full, never adapted."""

Architecture = Literal["dtf", "mod", "dense"]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Group(BaseModel):
    """A group of settings: unknown keys are refused, values are not bent into shape, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class RunSettings(Group):
    """`run.*`: name, place and machine."""

    name: Annotated[str, AfterValidator(_check_name)] = Field("run", description="Name of the run folder.")
    output_dir: str = Field("outputs", min_length=1, description="Runs go to OUTPUT_DIR/<date>/<name>/.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of initialization, data order and dropout.")
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "auto", description="auto (the best there is), cpu, cuda, cuda:N, mps or xpu."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of computation; weights stay float32. auto: what the device does well."
    )


class ScratchSettings(Group):
    """`model.scratch.*`: the backbone's shape when there is no base model."""

    family: Literal["llama", "qwen2"] = Field("llama", description="Which backbone to build.")
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
        heads, size = self.num_attention_heads, self.hidden_size
        _require(
            size % (2 * heads) == 0,
            "hidden_size",
            size,
            f"rotary positions need an even size for each of the {heads} heads; take a multiple of {2 * heads}",
        )
        _require(
            heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"must divide num_attention_heads = {heads}",
        )
        return self


def _routing_group() -> type[Group]:
    """A group with every field of `RoutingFields`; unset (None) means the config class's own default."""
    hints = get_type_hints(RoutingFields)
    definitions: dict[str, Any] = {
        f.name: (
            Annotated[hints[f.name] | None, AfterValidator(partial(_check_routing_field, f.name))],
            Field(None, description=f.metadata["help"]),
        )
        for f in fields(RoutingFields)
        if f.name in ROUTING_NAMES
    }
    return create_model("RoutingGroup", __base__=Group, **definitions)


RoutingGroup = _routing_group()


class ModelSettings(RoutingGroup):  # type: ignore[valid-type, misc]  # built at run time from RoutingFields
    """`model.*`: what to start from and how to route it."""

    architecture: Architecture = Field(
        "dtf", description="dtf (routes by surprise), mod (Mixture-of-Depths) or dense (the stock model)."
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
        if self.architecture != "dense":
            layers = None if self.base else self.scratch.num_hidden_layers
            check_routing_fields({"architecture": self.architecture, **self.routing_fields()}, layers)
        return self

    def routing_fields(self) -> dict[str, Any]:
        """The routing fields that are set; the others keep the config class's defaults."""
        values = {name: getattr(self, name) for name in ROUTING_NAMES}
        return {name: value for name, value in values.items() if value is not None}


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
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="How often to draw a document from this source when streaming, beside the others'."
    )
    streaming: bool = Field(False, description="Read the source while training, not before; all sources or none.")

    @model_validator(mode="after")
    def _check_reading(self) -> "Source":
        _require(
            self.streaming or self.weight is None,
            "weight",
            self.weight,
            "only streaming reads it; use ratio to keep a share, or set streaming=true",
        )
        _require(
            not self.messages_field or self.text_field == "text",
            "text_field",
            self.text_field,
            f"nothing reads it, since messages_field = {self.messages_field} is set; leave one of them out",
        )
        return self


class DataSettings(Group):
    """`data.*`: the text to train on."""

    sources: list[Source] = Field(
        default_factory=lambda: [Source(path="python-stdlib")],
        min_length=1,
        description="Where documents come from.",
        examples=['[{path = "novels.parquet"}]'],
    )
    seq_len: Annotated[int, BeforeValidator(_whole), Field(ge=8)] = Field(1024, description="Tokens per sequence.")
    validation_fraction: Share = Field(0.01, description="Share of the documents held out; 0: no validation.")
    validation_blocks: Count = Field(64, description="Held-out sequences used for each evaluation.")
    tokenizer: str = Field("", description="Hub id or folder; empty: the base model's, or one trained on the data.")
    max_documents: Count | None = Field(None, description="Read only so many, from the sources in turns; unset: all.")
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
            _require(
                source.streaming == self.streaming,
                f"sources[{index}].streaming",
                source.streaming,
                "other sources stream, and all do or none; set it for each of them",
            )
            if weighted and source.weight is None:
                raise ValueError(
                    f"sources[{index}].weight = unset: other sources have a weight; give every source one, or none"
                )
        return self


class LearningRates(Group):
    """`training.learning_rates.*`: the peak rate of each group of parameters."""

    base: Rate = Field(1e-5, description="The backbone.")
    prior: Rate = Field(1e-3, description="PriorFFN (dtf).")
    router: Rate = Field(1e-2, description="Routers: DTF's four scalars, MoD's linear score.")
    predictor: Rate = Field(1e-3, description="Routing predictors (model.predictor_loss_weight).")


class TrainingSettings(Group):
    """`training.*`: how long and how."""

    max_steps: Count | None = Field(None, description="Optimizer steps; unset: as many as training.epochs takes.")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="Passes over the data when max_steps is unset.")
    micro_batch_size: Count = Field(8, description="Sequences per forward and backward on each process.")
    tokens_per_update: Count | None = Field(
        None, description="Tokens per optimizer step, over micro-batches and processes; unset: one micro-batch of each."
    )
    learning_rates: LearningRates = Field(default_factory=LearningRates, description="Peak learning rates.")
    weight_decay: Rate = Field(0.01, description="AdamW's weight decay, of weight matrices alone.")
    decay_router_scalars: bool = Field(
        False, description="Decay the routers too (DTF's scalars, MoD's linear score), as the thesis did."
    )
    betas: Annotated[list[float], AfterValidator(_check_betas)] = Field(
        default_factory=lambda: [0.9, 0.95], description="AdamW's two averaging coefficients."
    )
    warmup_ratio: Share = Field(0.01, description="Share of the steps over which the rates rise from 0.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rates fall after warm-up; cosine and linear end at 0."
    )
    gradient_clip: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Largest norm of the gradient of a learning-rate group."
    )
    gradient_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="Recompute activations to save memory: all of them, or (selective) the cheap ones, keeping what "
        "matrix products and attention gave.",
    )
    compile: bool = Field(False, description="Compile each layer with torch.compile.")
    kernels: Literal["torch", "liger"] = Field(
        "torch", description="What runs norms and SwiGLU: torch, or on GPUs liger (pip install 'dtfcli[liger]')."
    )
    sharding: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="With several processes: ddp (each holds the whole model) or fsdp2 (each holds a part of it).",
    )
    eval_every: Count | None = Field(None, description="Steps between evaluations; unset: about ten over the run.")
    log_every: Count = Field(10, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: Count | None = Field(
        None, description="Steps between checkpoints; unset: about ten over the run."
    )
    keep_checkpoints: Count = Field(2, description="How many checkpoints are kept.")
    calibration_tokens: Count = Field(16384, description="Training tokens that calibrate the thresholds at the end.")
    threshold_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Last share of the updates that route by threshold, as inference does, instead of by top-K."
    )
    capacity_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How γ goes from capacity_start to model.capacity; constant: it is that from the start."
    )
    capacity_start: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="γ of the first update under a capacity_schedule."
    )
    capacity_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.3, description="First share of the updates over which capacity_schedule runs."
    )
    router_warmup_steps: Annotated[int, BeforeValidator(_whole), Field(ge=0)] = Field(
        0, description="First so many updates that train routers, priors and predictors alone, the backbone frozen."
    )

    @model_validator(mode="after")
    def _check_kernels(self) -> "TrainingSettings":
        one = not (self.compile and self.kernels == "liger")
        _require(one, "kernels", self.kernels, "compile = true fuses the same operations; choose one of the two")
        return self

    @model_validator(mode="after")
    def _check_curriculum(self) -> "TrainingSettings":
        if self.capacity_schedule != "constant":
            left = 1 - self.threshold_fraction
            _require(
                self.capacity_fraction <= left + 1e-9,
                "capacity_fraction",
                self.capacity_fraction,
                f"γ must have arrived where thresholds take over (threshold_fraction = {self.threshold_fraction:g}); "
                f"at most {left:g}",
            )
        if self.max_steps is not None:
            _require(
                self.router_warmup_steps < self.max_steps,
                "router_warmup_steps",
                self.router_warmup_steps,
                f"the backbone would never be trained; fewer than max_steps = {self.max_steps}",
            )
        return self


class LoraSettings(Group):
    """`lora.*`: adapt the backbone by low-rank matrices; routers, priors and predictors are trained in full."""

    enabled: bool = Field(False, description="Freeze the backbone and train low-rank adapters of its projections.")
    r: Count = Field(16, description="Rank of the adapters.")
    alpha: Count = Field(32, description="Adapters are scaled by alpha / r.")
    dropout: Share = Field(0.05, description="Dropout in front of the adapters.")
    targets: Annotated[list[str], AfterValidator(_check_targets)] = Field(
        default_factory=lambda: list(LORA_TARGETS),
        min_length=1,
        description="Projections of the backbone's blocks that get adapters.",
        examples=['["q_proj", "v_proj"]'],
    )
    merge: bool = Field(False, description="Also write merged_model/: the final model with its adapters merged in.")


class DistillSettings(Group):
    """`distill.*`: also learn from the dense parent, the base before it was routed."""

    enabled: bool = Field(False, description="Add the divergence from the dense parent's predictions to the loss.")
    weight: Rate = Field(1.0, description="Weight of KL(parent ‖ model), beside the language-model loss's 1.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="T: both distributions are softened by it, and the divergence is scaled by T²."
    )
    hidden_weight: Rate = Field(
        0.0, description="Weight of the mean squared difference of the final hidden states; 0: not computed."
    )


class WandbSettings(Group):
    """`logging.wandb.*`: Weights & Biases."""

    enabled: bool = Field(False, description="Send the metrics to Weights & Biases; needs dtfcli[wandb].")
    project: str = Field("dtf", min_length=1, description="Project that the run appears in.")


class TensorboardSettings(Group):
    """`logging.tensorboard.*`: TensorBoard."""

    enabled: bool = Field(False, description="Write TensorBoard files to the run folder; needs dtfcli[tensorboard].")


class TrackioSettings(Group):
    """`logging.trackio.*`: trackio."""

    enabled: bool = Field(False, description="Record the metrics with trackio; needs dtfcli[trackio].")


class LoggingSettings(Group):
    """`logging.*`: what a run shows, and who else is told its metrics."""

    live: bool = Field(True, description="Draw progress in the terminal (never when stderr is none).")
    wandb: WandbSettings = Field(default_factory=WandbSettings, description="Weights & Biases.")
    tensorboard: TensorboardSettings = Field(default_factory=TensorboardSettings, description="TensorBoard.")
    trackio: TrackioSettings = Field(default_factory=TrackioSettings, description="trackio.")


class EvalSettings(Group):
    """`eval.*`: benchmarks at the end of a run."""

    after: str = Field(
        "", description="Suites or lm-eval tasks to run on the final model, with commas, such as general; empty: none."
    )
    tasks: list[str] = Field(default_factory=list, description="More tasks to run with them.", examples=['["sciq"]'])
    limit: Count | None = Field(None, description="Score only the first so many items of each task; unset: all.")
    data_dir: str = Field(
        "", description="Folder of datasets as OWNER/NAME/…, used instead of the Hub; empty: the Hub."
    )


class HubSettings(Group):
    """`hub.*`: where the finished model goes."""

    repo: Annotated[str, AfterValidator(_check_repo)] = Field(
        "", description="Push the final model to this repository, owner/name or a name of yours; empty: nowhere."
    )
    private: bool = Field(False, description="Make that repository private when it is new.")


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
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given: `load_settings` gathers the layers itself, to know where each value came from."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_across(self) -> "Settings":
        scratch, length = self.model.scratch, self.data.seq_len
        if not self.model.base:
            longest = scratch.max_position_embeddings
            _require(
                length <= longest,
                "data.seq_len",
                length,
                f"a model of model.scratch.max_position_embeddings = {longest} takes no more; change one of the two",
            )
        if self.data.streaming and self.training.max_steps is None:
            raise ValueError(
                "training.max_steps = unset: data.sources stream, and a stream has no end; set it, such as "
                "training.max_steps=1000"
            )
        for name, group, why in (
            ("lora", self.lora, "random weights are not saved with an adapter"),
            ("distill", self.distill, "a model from scratch has no dense parent"),
        ):
            remedy = f"{why}; set model.base to a pretrained model"
            _require(not group.enabled or bool(self.model.base), f"{name}.enabled", True, remedy)
        self.accumulation_steps()
        return self

    @property
    def tokens_per_update(self) -> int:
        """Tokens per optimizer step, over all processes."""
        return self.training.tokens_per_update or self.training.micro_batch_size * self.data.seq_len

    def accumulation_steps(self, processes: int = 1) -> int:
        """Micro-batches per optimizer step on each process.

        Raises:
            ValueError: tokens_per_update is no multiple of what the processes take at a time.
        """
        micro, length = self.training.micro_batch_size, self.data.seq_len
        unit = micro * length * processes
        wanted = self.tokens_per_update
        if wanted % unit == 0:
            return wanted // unit
        below, above = wanted // unit * unit, (wanted // unit + 1) * unit
        nearest = f"the nearest are {below} and {above}" if below else f"the smallest is {unit}"
        names, numbers = "training.micro_batch_size × data.seq_len", f"{micro} × {length}"
        if processes > 1:
            names, numbers = f"{names} × processes", f"{numbers} × {processes}"
        remedy = f"must be a multiple of {names} = {numbers} = {unit}; {nearest}"
        rows, left = divmod(wanted, length * processes)
        if left == 0 and rows < micro:
            remedy += f", or set training.micro_batch_size={rows}"
        raise ValueError(f"training.tokens_per_update = {wanted}: {remedy}")

    def to_toml(self) -> str:
        """The resolved settings as TOML that `--config` takes: what is read and set, without the rest."""
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
    settings, lines = resolve(
        Settings, Layers(Settings, preset, overrides, Path(config) if config is not None else None)
    )
    if settings is None:
        hidden = len(lines) - SHOWN_PROBLEMS
        more = [f"… and {hidden} more."] if hidden > 0 else []
        raise ConfigError("\n".join([*lines[:SHOWN_PROBLEMS], *more]))
    return settings


def file_problems(config: Path) -> list[str]:
    """Every mistake in a settings file, one line each; an empty list when it is right.

    Raises:
        ConfigError: it cannot be read at all.
    """
    return resolve(Settings, Layers(Settings, None, (), config))[1]
