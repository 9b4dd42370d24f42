"""A path → model and tokenizer, whatever kind of path it is; nothing is silently missing."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from dtfcli.errors import BROKEN, CheckpointError, ConfigError, DTFError, HubError, reading, reason_of
from dtfcli.loading.adapters import apply_adapter, read_adapter_config
from dtfcli.loading.checks import check_built_config, check_config, check_files
from dtfcli.loading.devices import DTYPES, has_fast_bfloat16, resolve_device
from dtfcli.loading.paths import ModelPath, resolve_model_path
from dtfcli.loading.quantization import check_quantize
from dtfcli.loading.quantization import quantize as quantize_weights
from dtfcli.models.conversion import ROUTING_FIELD_NAMES, convert, load_dense, load_whole
from dtfcli.models.pretrained import is_routed
from dtfcli.quiet import quiet_libraries

_DAMAGE: tuple[type[Exception], ...] = (*BROKEN, SafetensorError, StrictDataclassError, pickle.UnpicklingError)
"""What damaged files raise in Transformers, peft, safetensors and torch."""


def load_model(
    path: str | Path,
    routing: str | None = None,
    capacity: float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> PreTrainedModel:
    """A trained model, dense or routed, in eval mode.

    Args:
        path: model folder, run folder, adapter folder (its adapters are merged into its base), .gguf file, or Hub
            id[@revision].
        routing: "threshold", "predictor" or "topk"; None or "auto": the mode saved with the model. Routed models only.
        capacity: γ for all routed layers; None: the model's own. Routed models only.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        dtype: auto (the checkpoint's own, or float32 where the device does not compute in it, and for adapters),
            float32, bfloat16 or float16.
        revision: branch, tag or commit of a Hub id.
        attn_implementation: sdpa, eager or flash_attention_2; None: Transformers chooses.
        trust_remote_code: run code that comes with the model; dtf's own classes need none.
        quantize: int8 or int4: the backbone's projections in so many bits, by torchao; None: as they are.

    Raises:
        CheckpointError: no model is there, or it is damaged.
        ConfigError: a routing option for a dense model, or one that the model refuses; an unknown device or dtype; or
            the model cannot be quantized so, or not here.
        HubError: the Hub cannot be reached.
    """
    source = resolve_model_path(path, revision)
    target = resolve_device(str(device))
    if quantize is not None:
        check_quantize(quantize, target)
    with explained_load_errors(source):
        wanted = _load_dtype(source, dtype, target, trust_remote_code)
        model = load_weights(source, wanted, attn_implementation, trust_remote_code)
    _set_routing(model, None if routing == "auto" else routing, capacity, str(path))
    model = model.to(target).eval()  # type: ignore[arg-type]  # wrapped by Transformers without its types
    if quantize is not None:
        quantize_weights(model, quantize)
    return model


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_model` takes.

    Raises:
        CheckpointError: there is none, or it is damaged.
        HubError: the Hub cannot be reached.
    """
    source = _resolve_tokenizer_path(path, revision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    place = source.path
    if source.kind == "gguf":
        place, options["gguf_file"] = str(Path(source.path).parent), Path(source.path).name
    with explained_load_errors(source, "tokenizer"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, revision=source.revision, **options)
            _try_out(tokenizer)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise ValueError(str(error)) from error  # a bare Exception is all that the library `tokenizers` raises
    return tokenizer


def _try_out(tokenizer: Any) -> None:
    """Use a tokenizer once: some damage shows only then.

    Raises:
        TypeError, ValueError, Exception: it cannot be used.
    """
    ids = tokenizer("a")["input_ids"]
    tokenizer.decode(ids)
    template = tokenizer.chat_template
    if not isinstance(template, str | dict | None):
        raise TypeError(f"its chat template is no text but {type(template).__name__}")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise TypeError(f"model_max_length = {tokenizer.model_max_length!r}: not a number")


def _resolve_tokenizer_path(path: str | Path, revision: str | None) -> ModelPath:
    """As for a model, but a folder that holds a tokenizer alone will do."""
    folder = Path(path).expanduser()
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return ModelPath("folder", str(folder))
    return resolve_model_path(path, revision)


def load_weights(
    source: ModelPath, dtype: Any, attn_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """A model with all of its weights.

    Raises:
        ValueError: weights are missing, or are not known to the model.
        CheckpointError: a file promises more than the weights hold.
    """
    _check_promises(source, trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if source.kind == "gguf":
        return load_dense(source.path, **options)
    adapter = _adapter_folder(source)
    if adapter is not None:
        return _load_adapter(adapter, dtype, attn_implementation, trust_remote_code)
    return load_whole(source.path, revision=source.revision, **options)


def base_config(source: ModelPath, trust_remote_code: bool) -> Any:
    """The configuration of a model, checked on its own: its weights may not be here."""
    place, options = source.path, dict[str, Any]()
    if source.kind == "gguf":
        file = Path(source.path)
        place, options = str(file.parent), {"gguf_file": file.name}
    elif source.kind == "hub":
        values, _ = PreTrainedConfig.get_config_dict(source.path, revision=source.revision)
        check_config(f"{source.path}: config.json", values, None)
        return AutoConfig.from_pretrained(place, revision=source.revision, trust_remote_code=trust_remote_code)
    named = source.path if source.kind == "gguf" else str(Path(place) / "config.json")
    with reading(named, "save or download the model again", also=(StrictDataclassError,)):
        try:
            return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
        except ValueError as error:
            raise _wants_code(named, error) or error from error


def _check_promises(source: ModelPath, trust_remote_code: bool) -> None:
    """Refuse a model whose configuration asks for more than its weights, before anything is built."""
    if source.is_adapter:
        check_files(Path(source.path))
        return
    stored = None if source.kind == "hub" else check_files(Path(source.path))
    check_built_config(source.path, base_config(source, trust_remote_code), stored)


def _adapter_folder(source: ModelPath) -> Path | None:
    """The adapter folder that a source is, fetched if it is on the Hub; None: it is none."""
    if source.kind == "folder":
        return Path(source.path) if source.is_adapter else None
    if source.kind != "hub" or find_adapter_config_file(source.path, revision=source.revision) is None:
        return None
    return Path(
        snapshot_download(source.path, revision=source.revision, allow_patterns=["*.json", "adapter_model.safetensors"])
    )


def _load_adapter(
    folder: Path, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The base of an adapter, routed as the adapter's own configuration says, with the adapter merged in.

    Merging happens in float32, whatever the precision wanted: the changes are small beside the weights.

    Raises:
        CheckpointError, HubError: the base cannot be had.
        ValueError: the adapter does not fit it.
    """
    config = read_adapter_config(folder)
    base = config["base_model_name_or_path"]
    try:
        source = resolve_model_path(base, config.get("revision") or None)
        with explained_load_errors(source):
            model: Any = load_weights(source, torch.float32, attn_implementation, trust_remote_code)
    except (CheckpointError, HubError) as error:
        raise type(error)(f"{folder}: the base model of this adapter cannot be had. {error}") from error
    own = None
    if (folder / "config.json").is_file():
        own = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(own, "routed_layer_indices"):
        model = _routed_like(model, own)
    model = apply_adapter(model, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _routed_like(base: Any, config: Any) -> PreTrainedModel:
    """A base model routed by a configuration; what routing adds is still to be loaded.

    Raises:
        ValueError: the base is routed in another way.
    """
    fields = {name: getattr(config, name) for name in ROUTING_FIELD_NAMES}
    if not is_routed(base):
        return convert(base, fields.pop("architecture"), fields.pop("capacity"), **fields)
    for name, value in fields.items():
        if name != "routing" and getattr(base.config, name) != value:
            raise ValueError(
                f"{name} = {value!r}, but its base has {getattr(base.config, name)!r}; it is another base."
            )
    base.config.routing = fields["routing"]
    return base


def _load_dtype(source: ModelPath, dtype: str | torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r}: choose one of auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if source.kind == "gguf" or source.is_adapter:
        return torch.float32
    own = base_config(source, trust_remote_code).dtype
    slow_half = own == torch.bfloat16 and not has_fast_bfloat16(device)
    if own is None or slow_half or (own == torch.float16 and device.type == "cpu"):
        return torch.float32
    return own


def _set_routing(model: Any, routing: str | None, capacity: float | None, path: str) -> None:
    if routing is None and capacity is None:
        return
    if not is_routed(model):
        name, value = ("routing", routing) if routing is not None else ("capacity", capacity)
        raise ConfigError(f"{name} = {value!r}: {path} is a dense model, which routes nothing; leave it out.")
    try:
        model.set_routing(routing or model.routing, capacity)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


@contextmanager
def explained_load_errors(source: ModelPath, what: str = "model") -> Iterator[None]:
    """Turn what Transformers, safetensors and the Hub's client raise into one line; keep them quiet meanwhile.

    Raises:
        CheckpointError: the user named something that is not there or cannot be used.
        HubError: the Hub could not be reached.
    """
    try:
        with quiet_libraries():
            if source.kind != "hub":
                check_files(Path(source.path))
            yield
    except DTFError:
        raise
    except _DAMAGE as error:
        name = source.path if source.revision is None else f"{source.path}@{source.revision}"
        if (refused := _wants_code(name, error)) is not None:
            raise refused from error
        if source.kind == "hub" and isinstance(error, OSError):
            raise _hub_error(name, error, what) from error
        remedy = f"Save or download the {what} again."
        raise CheckpointError(f"{name}: the {what} cannot be loaded. {reason_of(error)}. {remedy}") from error


def _wants_code(name: str, error: Exception) -> CheckpointError | None:
    """The error of a model that brings its own code; None: something else is wrong."""
    if "trust_remote_code" not in str(error):
        return None
    return CheckpointError(
        f"{name}: runs code that comes with it, which is not trusted; read that code, then allow it with "
        "--trust-remote-code (model.trust_remote_code = true for a base)."
    )


def _hub_error(name: str, error: BaseException, what: str) -> DTFError:
    """Which of the Hub's troubles it is: no such repository, no access, or no network."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {type(link).__name__ for link in chain}
    if kinds & {"GatedRepoError"}:
        return HubError(
            f"{name}: access to this model is restricted; ask for it on its Hub page, then `hf auth login`."
        )
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"}:
        return CheckpointError(f"{name}: neither a path on this machine nor a {what} on the Hub; check the spelling.")
    return HubError(
        f"{name}: no such path on this machine, and the Hub cannot be reached to look there; "
        "check the network, or give a folder or .gguf file."
    )
