"""LoRA: low-rank adapters of the backbone's projections, by peft; the parts that routing adds are trained in full.

The notable choices:

- An adapter folder is one that peft knows (adapter_config.json, adapter_model.safetensors). The tensors of routers,
  priors and predictors, thresholds included, lie in the same file under their own names, so that
  `PeftModel.from_pretrained(routed_model, folder)` finds them too. config.json holds the routing of the base.
- Adapters are injected into the model instead of wrapped around it: it keeps its class, and with it routing,
  calibration and generation.
- The base is frozen and never written to: it is stored nowhere, only named.
- peft is imported where it is used: it takes a second, which a plain model need not wait.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dtfcli.errors import ConfigError
from dtfcli.loading.model_files import ADAPTER_WEIGHTS
from dtfcli.loading.quantization import projections
from dtfcli.loading.source import open_source
from dtfcli.models.pretrained import is_added
from dtfcli.settings import Settings
from dtfcli.settings.training import LORA_TARGETS

_PREFIX = "base_model.model."
_NAME = "default"


def adapt(model: Any, settings: Settings) -> Any:
    """Freeze the backbone and give it adapters, if `lora.enabled`; the parts that routing adds stay trainable.

    The model, routed or dense, on any device (meta included), is changed in place and returned.
    """
    if not settings.lora.enabled:
        return model
    from peft import LoraConfig, inject_adapter_in_model

    base = open_source(settings.model.base, settings.model.revision or None)
    lora, there = settings.lora, {name.rpartition(".")[2] for name, _ in projections(model)}
    targets = there if {*lora.targets} == {*LORA_TARGETS} else there & {*lora.targets}  # the default: all there are
    if not targets:
        raise ConfigError(
            f"lora.targets = {lora.targets}: {type(model).__name__} has none of them; its projections are "
            f"{', '.join(sorted(there))}. Leave it out to adapt all."
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path if base.kind == "hub" else str(Path(base.path).resolve()),
        revision=base.revision,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(targets),
        exclude_modules=r".*\.forecast\..*",  # routed MLPs have projections of the same names in theirs
    )
    trained = [parameter for name, parameter in model.named_parameters() if is_added(name) and parameter.requires_grad]
    # Peft asks models by names that Transformers has renamed, and warns.
    with torch.device(model.device), warnings.catch_warnings(action="ignore"):
        inject_adapter_in_model(config, model, _NAME)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter folder, by peft's names: the adapters' and the ones that routing adds."""
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            state[_PREFIX + name.replace(f".{_NAME}", "")] = tensor
        elif is_added(name):
            state[_PREFIX + name] = tensor
    return state


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put stored tensors, whole ones, back into a model with the same adapters, sharded or not."""
    with torch.no_grad():
        for name, tensor in adapter_state(model).items():
            stored = state[name]
            if isinstance(tensor, DTensor):
                stored = distribute_tensor(stored.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(stored)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The stored tensors of an adapter folder."""
    return load_file(folder / ADAPTER_WEIGHTS)


def save_adapter(model: Any, folder: Path, state: dict[str, Tensor]) -> None:
    """Write an adapter folder: adapters and the parts that routing adds (`state`, whole), and both configurations."""
    config = copy.copy(model.peft_config[_NAME])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)
    stored = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # Without the code that a routed model's folder has: an adapter does not open by itself.
    model.config.to_json_file(folder / "config.json")
    model.generation_config.save_pretrained(folder)


def merge(model: Any) -> Any:
    """The plain model with the function of an adapted one, which it takes apart."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)


def apply_adapter(model: Any, folder: Path) -> Any:
    """A base model with the adapters of a folder merged into it.

    Args:
        model: the base, routed already where the adapter is of a routed model; in float32, since merging rounds.
        folder: the adapter folder, of this package or of peft.

    Raises:
        ValueError: tensors are missing from the folder, or do not belong to this model; nothing is drawn afresh.
        CheckpointError: its files are damaged.
    """
    from peft import PeftModel, get_peft_model_state_dict

    added = {_PREFIX + name for name in model.state_dict() if is_added(name)}
    with warnings.catch_warnings(action="ignore"):  # of missing keys, which are refused below
        wrapped = PeftModel.from_pretrained(model, str(folder))
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        stored = set(file.keys())
    if (folder / "config.json").is_file():
        expected |= added
    foreign = {name for name in stored - expected - added if ".lora_" in name or is_added(name)}
    for problem, names in (("missing", expected - stored), ("not known to the base", foreign)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (" and more" if len(names) > 3 else "")
            raise ValueError(f"Weights are {problem}: {some}. The adapter is damaged or of another base.")
    plain = wrapped.merge_and_unload()
    vars(plain).pop("peft_config", None)
    return plain.requires_grad_(True)
