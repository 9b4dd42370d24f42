"""Where weights, gradients and optimizer states live when several processes train one model.

`Replicated`: everything whole on every device; alone, or as DDP, which averages the gradients. `accelerate` does it.
`Sharded`: FSDP2 (`torch.distributed.fsdp.fully_shard`). Each layer's parameters are spread over the devices and
gathered when the layer runs; the main process alone reads the weights and hands them on, a layer at a time.

Choices for FSDP2, which accelerate would silently replace by DDP on CPUs:

- embeddings, final norm and head are one group with the losses around them, because these use the head's weight;
- routers stay whole everywhere, float32: they are a few numbers, and calibration asks them outside of any forward;
- in bfloat16 layers are gathered in it, halving the traffic; gradients are reduced in float32.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
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

from dtfcli.training.processes import Processes
from dtfcli.training.stored_states import explained_states, load_shards

_SHARDS = "shards"
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Replicated:
    """All of the model on every device.

    Attributes:
        objective: the losses around the model, to call in evaluations.
        trained: what to call in training; averages gradients over processes.
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
        """Around all micro-batches of an update: autocast then converts each weight once, not once for each of them."""
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; autocast is about the forward pass alone."""
        with torch.autocast(self.processes.device.type, enabled=False):
            self.accelerator.backward(loss)

    def accumulating(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around each micro-batch of an update: gradients travel with the last one."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.trained)

    def reduce_gradients(self) -> None:
        """Average over processes what `trained` has not."""

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
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            load_model(self.objective.model, files[0], device=str(self.processes.device))
        else:
            weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
            self.objective.model.load_state_dict(weights, strict=False)

    def save(self, folder: Path) -> None:
        """Write the states of a checkpoint, the random generators of every process among them."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Read what `save` has written.

        Raises:
            CheckpointError: a file is damaged, does not fit, or holds more than data.
        """
        with explained_states(folder):
            self.accelerator.load_state(str(folder))


class Sharded(Replicated):
    """Each device holds its part of every parameter, gradient and optimizer state."""

    @property
    def needs_weights(self) -> bool:
        return self.processes.is_main

    def prepare(self, objective: nn.Module, build_optimizer: Callable[[], Any]) -> None:
        # Harmless here: nothing adds in place to what a layer returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.processes.device.type, (self.processes.count,))
        model: Any = objective.model
        self.replicated: list[nn.Parameter] = []
        half = self.accelerator.mixed_precision == "bf16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for layer in model.model.layers:
            self._materialize(list(layer.modules()))
            kept = [p for name, p in layer.named_parameters() if "router" in name]
            self.replicated += kept
            predictor = getattr(layer, "predictor", None)
            if predictor is not None:  # calibration asks it outside of its layer's forward
                fully_shard(predictor, mesh=mesh, mp_policy=policy)
            fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=set(kept))
        inside = {module for layer in model.model.layers for module in layer.modules()}
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
        with objective.model.routing_mode("topk") if objective.routed else nullcontext():
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
            self.processes.share([tensor.data for tensor in tensors])

    def converting_once(self) -> AbstractContextManager[Any]:
        return nullcontext()  # layers are gathered in their type, and gone after each pass

    def accumulating(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext()  # whole gradients are never kept: each micro-batch's are reduced at once

    def reduce_gradients(self) -> None:
        grads = [p.grad for p in self.replicated if p.grad is not None]
        if grads:
            flat = torch.cat([grad.flatten() for grad in grads])
            self.processes.average(flat)
            for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

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
            weights = {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self.objective.model, weights, options=options)

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))  # the random generators
        weights, states = get_state_dict(self.objective.model, self.optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / _SHARDS)

    def load(self, folder: Path) -> None:
        weights, states = get_state_dict(self.objective.model, self.optimizer)
        load_shards({"model": weights, "optimizer": states}, folder / _SHARDS)
        set_state_dict(self.objective.model, self.optimizer, model_state_dict=weights, optim_state_dict=states)
        super().load(folder)  # the random generators; last, because filling the optimizer may draw numbers
