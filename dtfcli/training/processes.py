"""Several processes that train one model: which one writes, what they agree on, and means over them.

Choices: every process computes on its own rows and takes part in every collective call; the main one alone writes
files and prints. Whatever decides how a run continues (a folder, a checkpoint, a request to stop) is decided once and
broadcast to all, so that no process waits for one that has left.
"""

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from dtfcli.errors import ConfigError, DTFError
from dtfcli.loading.devices import compute_dtype, resolve_device
from dtfcli.settings import Settings
from dtfcli.training.plan import for_processes

T = TypeVar("T")

_MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
_PATIENCE = datetime.timedelta(hours=12)
"""How long a process waits for the others: the main one may be tokenizing a large text meanwhile."""

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessLost(DTFError):
    """Another process of the run has ended."""


def world_size() -> int:
    """How many processes a launcher has started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Whether this process writes and talks; known before anything is set up."""
    return int(os.environ.get("RANK") or 0) == 0


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        count: how many there are.
        rank: of this one, from 0.
        device: of this one.
    """

    count: int = 1
    rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, in every process; a `DTFError` there is raised in all of them."""
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except DTFError as error:
                if self.count == 1:
                    raise
                made[1] = error
        if self.count > 1:
            dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over processes of each 0-d tensor, in one exchange; all have the same names."""
        if self.count == 1 or not values:
            return dict(values)
        stacked = torch.stack([value.float() for value in values.values()])
        self.average(stacked)
        return dict(zip(values, stacked, strict=True))

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor /= self.count

    def share(self, tensors: list[Tensor]) -> None:
        """Replace tensors by the main process's."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def leave(self) -> None:
        """End what connects the processes: from here on each goes its own way, as if it had been started alone."""
        if self.count > 1:
            self.wait()
            dist.destroy_process_group()
            _forget_accelerate()
            for name in _LAUNCHER_VARIABLES:
                os.environ.pop(name, None)


def connect(settings: Settings) -> tuple[Accelerator, Processes]:
    """Choose device and precision, and connect with the other processes where a launcher has started some.

    Raises:
        ConfigError: the device is not there, or does not compute in this precision or with several processes.
    """
    device, count = resolve_device(settings.run.device), world_size()
    dtype = compute_dtype(settings.run.dtype, device)
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError("run.dtype = 'float16': the CPU does not train in it; use bfloat16, float32 or auto.")
    check_processes(settings, count)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    # accelerate keeps one state per process and refuses another precision: a second run starts afresh.
    _forget_accelerate()
    handlers: list[Any] = []
    if count > 1:
        # The loop averages the only buffers that change, once per update. layerdrop leaves parameters out.
        skips_layers = settings.model.architecture == "layerdrop"
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=skips_layers)
        handlers = [InitProcessGroupKwargs(timeout=_PATIENCE), ddp]
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # accelerate warns without
    accelerator = Accelerator(
        mixed_precision=_MIXED_PRECISION[dtype], cpu=device.type == "cpu", kwargs_handlers=handlers
    )
    return accelerator, Processes(accelerator.num_processes, accelerator.process_index, accelerator.device)


def check_processes(settings: Settings, count: int) -> None:
    """Refuse what does not go with this number of processes, before any is started.

    Raises:
        ConfigError: naming the setting or option.
    """
    device, sharded = resolve_device(settings.run.device), settings.training.sharding == "fsdp2"
    if sharded and count == 1:
        raise ConfigError(
            "training.sharding = 'fsdp2': one process cannot share; add --num-processes N, or leave it out."
        )
    if sharded and compute_dtype(settings.run.dtype, device) == torch.float16:
        raise ConfigError("training.sharding = 'fsdp2' does not go with run.dtype = 'float16'; use bfloat16.")
    if sharded and settings.distill.enabled:
        raise ConfigError("training.sharding = 'fsdp2' does not go with distill.enabled; use ddp.")
    if count == 1:
        return
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(f"{name} is set: dtf shards by itself; leave it to training.sharding=fsdp2.")
    if device.index is not None:
        raise ConfigError(
            f"run.device = {settings.run.device!r}: {count} processes need a device each; use {device.type}, and "
            "CUDA_VISIBLE_DEVICES to choose among them."
        )
    if device.type == "mps":
        raise ConfigError(f"--num-processes {count}: run.device = 'mps' trains with one; leave the option out.")
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or count)
    if device.type != "cpu":
        found = getattr(torch, device.type).device_count()
        if here > found:
            raise ConfigError(
                f"--num-processes {here}: each needs a {device.type} device, and {found} are here; use at most {found}."
            )
    for_processes(settings, count)


def _forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
