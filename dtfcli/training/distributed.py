"""Several processes that train one model: their exchanges, and the place of weights, gradients and optimizer states.

Every process computes on its own rows and takes part in every collective call. The main one alone writes files, prints,
and decides how a run continues (its folder, a checkpoint): no process waits for one that has left.

`Replicated`: everything whole on every device; alone, or as DDP, which averages the gradients. `accelerate` does it.
`Sharded`: FSDP2 (`torch.distributed.fsdp.fully_shard`). Each layer's parameters are spread over the devices and
gathered when the layer runs; the main process alone reads the weights and broadcasts them, a layer at a time.

Choices for FSDP2, which accelerate would silently replace by DDP on CPUs:

- embeddings, final norm and head are one group with the losses around them, because these use the head's weight;
- routers stay whole everywhere, float32: they are a few numbers, and calibration asks them outside of any forward;
- in bfloat16 layers are gathered in it, halving the traffic; gradients are reduced in float32.
"""

import copy
import datetime
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, load
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dtfcli.errors import ConfigError, DTFError, reading, reason_of
from dtfcli.loading.devices import compute_dtype, resolve_device
from dtfcli.models.modeling_routed_mlp import decoder_layers
from dtfcli.settings import Settings
from dtfcli.training.plan import for_processes

T = TypeVar("T")

_SHARDS = "shards"
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_RANDOM_STATES = {"random_state", "numpy_random_seed", "torch_manual_seed"}
_PRECISION_NAMES = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TIMEOUT = datetime.timedelta(hours=12)
"""Of a collective call: the main process may be tokenizing a large text meanwhile."""

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """How many processes a launcher has started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Whether this process writes and prints; known before anything is set up."""
    return int(os.environ.get("RANK") or 0) == 0


@dataclass(frozen=True)
class Processes:
    """The processes of a run: their number, and the rank (from 0) and device of this one."""

    world_size: int = 1
    rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Return when every process has called this."""
        if self.world_size > 1:
            dist.barrier()

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def from_main(self, make: Callable[[], T]) -> T:
        """The main process's result of `make`, in every process; a `DTFError` there is raised in all of them."""
        if self.world_size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except DTFError as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_mean(self, tensors: list[Tensor]) -> None:
        """Replace float32 tensors by their means over processes, in one exchange."""
        if self.world_size > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.world_size
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Replace tensors by the main process's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def disconnect(self) -> None:
        """End the process group: from here on each process runs as if it had been started alone."""
        if self.world_size > 1:
            self.barrier()
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
        # The loop averages the only buffers that change, once per step. layerdrop leaves parameters out.
        skips_layers = settings.model.architecture == "layerdrop"
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=skips_layers)
        handlers = [InitProcessGroupKwargs(timeout=_TIMEOUT), ddp]
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # accelerate warns without
    accelerator = Accelerator(
        mixed_precision=_PRECISION_NAMES[dtype], cpu=device.type == "cpu", kwargs_handlers=handlers
    )
    return accelerator, Processes(accelerator.num_processes, accelerator.process_index, accelerator.device)


def check_processes(settings: Settings, count: int) -> None:
    """Raise ConfigError for settings that do not go with this number of processes, before any is started."""
    device, sharding = resolve_device(settings.run.device), "training.sharding = 'fsdp2'"
    if settings.training.sharding == "fsdp2":
        if count == 1:
            raise ConfigError(f"{sharding}: one process cannot share; add --num-processes N, or leave it out.")
        if compute_dtype(settings.run.dtype, device) == torch.float16:
            raise ConfigError(f"{sharding} does not go with run.dtype = 'float16'; use bfloat16.")
        if settings.distill.enabled:
            raise ConfigError(f"{sharding} does not go with distill.enabled; use ddp.")
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
    if device.type != "cpu" and here > (devices := getattr(torch, device.type).device_count()):
        raise ConfigError(
            f"--num-processes {here}: each needs a {device.type} device, and this machine has {devices}; use at most "
            f"{devices}."
        )
    for_processes(settings, count)


def _weights_in(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder, each of them once if some are tied."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def _forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Replicated:
    """All of the model on every device.

    Attributes:
        objective: the losses around the model, to call in evaluations.
        trained: the module to call in training; averages gradients over processes.
        optimizer: of its parameters.
    """

    objective: Any
    trained: Any
    optimizer: Any

    def __init__(self, accelerator: Any, processes: Processes) -> None:
        self.accelerator, self.processes = accelerator, processes

    @property
    def needs_weights(self) -> bool:
        """Whether this process has to read the weights of the model."""
        return True

    def prepare(self, objective: nn.Module, build_optimizer: Callable[[], Any]) -> None:
        """Place the model, and build its optimizer."""
        self.objective = objective.to(self.processes.device)
        self.trained, self.optimizer = self.accelerator.prepare(self.objective, build_optimizer())

    def converting_once(self) -> AbstractContextManager[Any]:
        """Around all micro-batches of a step: autocast then converts each weight once, not once for each of them."""
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; autocast is about the forward pass alone."""
        with torch.autocast(self.processes.device.type, enabled=False):
            self.accelerator.backward(loss)

    def accumulating(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around each micro-batch of a step: gradients travel with the last one."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.trained)

    def reduce_gradients(self) -> None:
        """Average over processes the gradients that `trained` has not."""

    def clip(self, parameters: list[Tensor], largest: float) -> float:
        """Clip the gradients of some parameters by their common norm, which is returned."""
        norm = nn.utils.clip_grad_norm_(parameters, largest)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Around calls of the model that do not come through `objective`."""
        yield

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The whole state dict for saving, in the main process; None: the model has it."""
        return None

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model, each of them whole, in every process."""
        return state

    def detached(self, model: Any, rebuild: Callable[[], Any]) -> Any:
        """A model like this one, in this process alone; `rebuild` makes it from the base where it lies in parts."""
        return copy.deepcopy(model)

    def load_weights(self, folder: Path) -> None:
        """Take the weights of a model folder that `save_pretrained` has written."""
        self.objective.model.load_state_dict(_weights_in(folder), strict=False)

    def save(self, folder: Path) -> None:
        """Write the states of a checkpoint, the random generators of every process among them."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Read the states that `save` has written.

        Raises:
            CheckpointError: a file is damaged, does not fit, or holds more than data. Nothing in it runs: accelerate
                reads with `weights_only`, and shards are safetensors.
        """
        remedy = f"delete {folder} to go on from the checkpoint before it, or start a new run"
        problem = "is damaged, or of another run; nothing in it was run as code"
        with reading(folder, remedy, also=(pickle.UnpicklingError, SafetensorError), what=problem):
            self._load(folder)
            # accelerate passes over random states that it cannot read, and says nothing.
            random_states = folder / f"random_states_{self.processes.rank}.pkl"
            if random_states.exists() and not set(load(random_states)) >= _RANDOM_STATES:
                raise ValueError(f"{random_states.name} holds no states of random generators")
            self.accelerator.load_state(str(folder))  # last, because filling an optimizer may draw numbers

    def _load(self, folder: Path) -> None:
        """Read the states that accelerate does not know."""


class Sharded(Replicated):
    """Each device holds its part of every parameter, gradient and optimizer state."""

    @property
    def needs_weights(self) -> bool:
        return self.processes.is_main

    def prepare(self, objective: nn.Module, build_optimizer: Callable[[], Any]) -> None:
        # Harmless here: nothing adds in place to the output of a layer.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.processes.device.type, (self.processes.world_size,))
        model: Any = objective.model
        layers = decoder_layers(model)
        self.replicated: list[nn.Parameter] = []
        half = self.accelerator.mixed_precision == "bf16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for layer in layers:
            self._materialize(list(layer.modules()))
            kept = [p for name, p in layer.named_parameters() if "router" in name]
            self.replicated += kept
            predictor = getattr(layer, "predictor", None)
            if predictor is not None:  # calibration asks it outside of its layer's forward
                fully_shard(predictor, mesh=mesh, mp_policy=policy)
            fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=set(kept))
        inside = {module for layer in layers for module in layer.modules()}
        self._materialize([module for module in objective.modules() if module not in inside])
        model.tie_weights()
        fully_shard(objective, mesh=mesh, ignored_params=set(self.replicated))
        objective.forward = self.accelerator.autocast()(objective.forward)
        self.objective = self.trained = objective
        self._pass_once()
        self.optimizer = build_optimizer()
        # Not handed to accelerate, whose checkpoints would hold the parts of one process as if they were all.

    @torch.no_grad()
    def _pass_once(self) -> None:
        """FSDP2 ties its groups together in the first forward of the outermost; calibration does not begin there."""
        objective = self.objective.eval()
        mode = ("topk",) if objective.blocks else ("threshold", 1.0)  # neither needs thresholds
        with objective.model.routing_mode(*mode) if objective.routed else nullcontext():
            objective(torch.zeros(1, 8, dtype=torch.long, device=self.processes.device), 1)
        objective.reshard()

    @torch.no_grad()
    def _materialize(self, modules: list[nn.Module]) -> None:
        """Give modules the main process's tensors, on the device; elsewhere they may be on the meta device."""
        device = self.processes.device
        for module in modules:
            if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module.to_empty(device=device, recurse=False)
            else:
                module._apply(lambda tensor: tensor.to(device), recurse=False)
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            self.processes.broadcast([tensor.data for tensor in tensors])

    def converting_once(self) -> AbstractContextManager[Any]:
        return nullcontext()  # layers are gathered in their type, and gone after each pass

    def accumulating(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext()  # whole gradients are never kept: each micro-batch's are reduced at once

    def reduce_gradients(self) -> None:
        self.processes.all_reduce_mean([p.grad for p in self.replicated if p.grad is not None])

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Embeddings, norm and head are gathered meanwhile; layers gather themselves."""
        self.objective.unshard()
        try:
            yield
        finally:
            self.objective.reshard()

    def whole_weights(self) -> dict[str, Tensor] | None:
        model = self.objective.model
        weights: dict[str, Any] = get_model_state_dict(model, options=_FULL)
        first: dict[int, str] = {}  # tied parameters are one tensor again, so that they are written once
        for name, parameter in model.named_parameters(remove_duplicate=False):
            same = first.setdefault(id(parameter), name)
            if weights and same != name:
                weights[name] = weights[same]
        return weights

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}

    def detached(self, model: Any, rebuild: Callable[[], Any]) -> Any:
        return rebuild()

    def load_weights(self, folder: Path) -> None:
        weights: dict[str, Any] = {}
        if self.processes.is_main:
            weights = _weights_in(folder)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self.objective.model, weights, options=options)

    def _states(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Weights, optimizer states, and the tensors of both: the numbers in between follow from settings and step."""
        weights, states = get_state_dict(self.objective.model, self.optimizer, options=_FLAT)
        model = self.objective.model
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
        once = {name: value for name, value in weights.items() if name not in tied}
        moments = {name: value for name, value in states.items() if torch.is_tensor(value)}
        return weights, states, {"model": once, "optimizer": moments}

    def save(self, folder: Path) -> None:
        super().save(folder)  # the random generators
        writer = HuggingFaceStorageWriter(str(folder / _SHARDS), save_distributed=True)
        dcp.save(self._states()[2], storage_writer=writer)

    def _load(self, folder: Path) -> None:
        weights, states, tensors = self._states()
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / _SHARDS)))
        except CheckpointException as error:  # which is no Exception
            raise ValueError(reason_of(next(iter(error.failures.values()))[0])) from error
        model, optimizer = self.objective.model, self.optimizer
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=_FLAT)
