"""`run.*` and `logging.*`: name, place and machine of a run, and who sees its metrics."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dtfcli.settings.group import Group, require


def _check_name(name: str) -> str:
    fits = re.fullmatch(r"[\w][\w .+@=-]*", name) and not name.endswith((" ", ".")) and len(name) <= 100
    require(bool(fits), "name", name, "it becomes a folder; use letters, digits and . _ - and at most 100 of them")
    return name


def _check_device(device: str) -> str:
    is_device = re.fullmatch(r"auto|cpu|mps|xpu|cuda(:\d+)?", device)
    require(bool(is_device), "device", device, "choose auto, cpu, mps, xpu, cuda or a numbered one such as cuda:0")
    return device


class RunSettings(Group):
    """`run.*`: name, place and machine."""

    name: Annotated[str, AfterValidator(_check_name)] = Field("run", description="Name of the run folder.")
    output_dir: str = Field("outputs", min_length=1, description="Runs go to OUTPUT_DIR/<date>/<name>/.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of initialization, data order and dropout.")
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "auto", description="auto (the best available), cpu, cuda, cuda:N, mps or xpu."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of computation; weights stay float32. auto: bfloat16 where the device has it.",
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
    """`logging.*`: the progress on the terminal, and the trackers that get the metrics."""

    live: bool = Field(True, description="Draw progress if stderr is a terminal.")
    wandb: WandbSettings = Field(default_factory=WandbSettings, description="Weights & Biases.")
    tensorboard: TensorboardSettings = Field(default_factory=TensorboardSettings, description="TensorBoard.")
    trackio: TrackioSettings = Field(default_factory=TrackioSettings, description="trackio.")
