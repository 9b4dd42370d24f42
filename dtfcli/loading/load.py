"""A path → model and tokenizer, whatever kind of path it is; nothing is silently missing."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dtfcli.errors import BROKEN, CheckpointError, ConfigError, DTFError, HubError, reason_of
from dtfcli.loading.adapters import apply_adapter
from dtfcli.loading.devices import DTYPES, has_fast_bfloat16, resolve_device
from dtfcli.loading.model_files import CONFIG, check_files, read_adapter_config
from dtfcli.loading.quantization import check_quantize
from dtfcli.loading.quantization import quantize as quantize_weights
from dtfcli.loading.source import ModelSource, open_source, untrusted_code
from dtfcli.models.conversion import ROUTING_FIELD_NAMES, convert, load_dense, load_whole
from dtfcli.models.pretrained import cast_weights, is_routed
from dtfcli.quiet import quiet_libraries

_DAMAGE: tuple[type[Exception], ...] = (*BROKEN, SafetensorError, StrictDataclassError, pickle.UnpicklingError)
"""Errors that damaged files cause in Transformers, peft, safetensors and torch."""


def load_model(
    path: str | Path | ModelSource,
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
            id[@revision]; or what `open_source` returned, with its own revision and trust.
        routing: "threshold", "predictor" or "topk"; None or "auto": the mode saved with the model. Routed models only.
        capacity: γ for all routed layers; None: the model's own. Routed models only.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
        dtype: auto (the checkpoint's own, or float32 where the device does not compute in it, and for adapters),
            float32, bfloat16 or float16.
        revision: branch, tag or commit of a Hub id.
        attn_implementation: sdpa, eager or flash_attention_2; None: Transformers chooses.
        trust_remote_code: run code that comes with the model; dtf's own classes need none.
        quantize: int8: the backbone's projections in 8 bits, by torchao; None: as they are.

    Raises:
        CheckpointError: no model is there, or it is damaged.
        ConfigError: a routing option for a dense model, or one that the model refuses; an unknown device or dtype; or
            the model cannot be quantized so, or not here.
        HubError: the Hub cannot be reached.
    """
    source = path if isinstance(path, ModelSource) else open_source(path, revision, trust_remote_code=trust_remote_code)
    with explained_load_errors(source):
        return _load(source, routing, capacity, device, dtype, attn_implementation, quantize)


def load_tokenizer(
    path: str | Path | ModelSource, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_model` takes, or one that lies alone in a folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
        HubError: the Hub cannot be reached.
    """
    if isinstance(path, ModelSource):
        source = path
    elif any((Path(path).expanduser() / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        folder = Path(path).expanduser()
        check_files(folder)
        source = ModelSource("folder", str(folder), trust_remote_code=trust_remote_code)
    else:
        source = open_source(path, revision, trust_remote_code=trust_remote_code)
    with explained_load_errors(source):
        return _tokenizer(source)


def load_model_and_tokenizer(source: ModelSource, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Both of one model, with the options and errors of `load_model`."""
    with explained_load_errors(source):
        return _load(source, **options), _tokenizer(source)


def _load(
    source: ModelSource,
    routing: str | None = None,
    capacity: float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    target = resolve_device(str(device))
    if quantize is not None:
        check_quantize(quantize)
    saved = None
    if dtype == "auto":
        source = source.fetched if source.kind == "hub" else source
        saved = None if source.kind == "gguf" or source.is_adapter else source.configuration.dtype
    model: Any = load_weights(source, weights_dtype(saved, dtype, target), attn_implementation)
    _set_routing(model, None if routing == "auto" else routing, capacity)
    model = model.to(target).eval()
    if quantize is not None:
        quantize_weights(model)
    return model


def _tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    place, options = source.path, dict[str, Any](revision=source.revision, trust_remote_code=source.trust_remote_code)
    if source.kind == "gguf":
        place, options["gguf_file"] = str(Path(source.path).parent), Path(source.path).name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        _try_out(tokenizer)
    except DTFError:
        raise
    except Exception as error:
        # The library `tokenizers` raises Exception itself; any other class that is no damage is our own mistake.
        if type(error) is not Exception and not isinstance(error, _DAMAGE):
            raise
        raise _explained(source, error, "tokenizer") from error
    return tokenizer


def _try_out(tokenizer: Any) -> None:
    """Use a tokenizer once: some damage shows only then."""
    tokenizer.decode(tokenizer("a")["input_ids"])
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise TypeError(f"its chat template is no text but {type(tokenizer.chat_template).__name__}")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise TypeError(f"model_max_length = {tokenizer.model_max_length!r}: not a number")


def load_weights(source: ModelSource, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """A model with all of its weights; errors are the libraries' own (see `explained_load_errors`).

    Raises:
        ValueError: weights are missing, or are not known to the model.
        CheckpointError: a file cannot be used.
    """
    source = source.fetched if source.kind == "hub" else source
    if source.is_adapter:
        return _load_adapter(source, dtype, attn_implementation)
    options: dict[str, Any] = {"dtype": dtype, "config": source.configuration}
    options |= {"trust_remote_code": source.trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if source.kind == "gguf":
        return load_dense(source.path, **options)
    return load_whole(source.path, revision=source.revision, **options)


def _load_adapter(adapter: ModelSource, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The base of an adapter, routed by the adapter's own configuration, with the adapter merged in.

    Merging happens in float32, whatever the precision: the changes are small next to the weights.
    """
    folder = Path(adapter.path)
    read_adapter_config(folder)
    try:
        base = adapter.base()
        with explained_load_errors(base):
            model: Any = load_weights(base, torch.float32, attn_implementation)
    except (CheckpointError, HubError) as error:
        raise type(error)(f"{folder}: the base model of this adapter is not available. {error}") from error
    if (folder / CONFIG).is_file():
        routing = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(routing, "routed_layer_indices"):
            model = _routed_like(model, routing)
    model = apply_adapter(model, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    cast_weights(model, dtype)
    return model


def _routed_like(base: Any, config: Any) -> PreTrainedModel:
    """A base model routed by a configuration; ValueError if it is already routed in another way."""
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


def weights_dtype(saved: torch.dtype | None, dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision that a model is opened in, by the `dtype` of `load_model`; "auto": as saved, None float32.

    Raises:
        ConfigError: an unknown dtype.
    """
    if dtype == "auto":
        return _fast_dtype(saved, device)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r}: choose one of auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    return dtype


def _fast_dtype(saved: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The precision that a model was saved in; float32 where the device is slow in that."""
    slow_half = saved == torch.bfloat16 and not has_fast_bfloat16(device)
    if saved is None or slow_half or (saved == torch.float16 and device.type == "cpu"):
        return torch.float32
    return saved


def _set_routing(model: Any, routing: str | None, capacity: float | None) -> None:
    if routing is None and capacity is None:
        return
    if not is_routed(model):
        name, value = ("routing", routing) if routing is not None else ("capacity", capacity)
        raise ConfigError(
            f"{name} = {value!r}: {model.name_or_path} is a dense model, which routes nothing; leave it out."
        )
    try:
        model.set_routing(routing or model.routing, capacity)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


@contextmanager
def explained_load_errors(source: ModelSource) -> Iterator[None]:
    """Turn errors of Transformers, safetensors and the Hub's client into one line; keep them quiet meanwhile."""
    try:
        with quiet_libraries(), gguf_read_once() if source.kind == "gguf" else nullcontext():
            yield
    except DTFError:
        raise
    except _DAMAGE as error:
        raise _explained(source, error, "model") from error


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Parse a GGUF file once inside of a `with` block, an outer one counts.

    Transformers does so for configuration, weights and tokenizer, and makes a table of tensor names for each module.
    """
    try:
        import gguf
    except ImportError:  # Transformers says what to install
        yield
        return
    library: Any = gguf
    theirs = library.GGUFReader, library.get_tensor_name_map
    if isinstance(theirs[0], type):
        library.GGUFReader, library.get_tensor_name_map = cache(theirs[0]), cache(theirs[1])
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = theirs


def _explained(source: ModelSource, error: Exception, part: str) -> DTFError:
    """An error of a library in words; `part`: model or tokenizer."""
    name = source.path if source.revision is None else f"{source.path}@{source.revision}"
    if "trust_remote_code" in str(error):
        return untrusted_code(name)
    if source.kind == "hub" and isinstance(error, OSError):
        return _hub_error(name, error, part)
    remedy = f"Save or download the {part} again."
    if "attention implementation" in str(error):
        remedy = "Name another with --attn-implementation."
    elif any(words in str(error) for words in _NO_TEXT):
        remedy = "Give a model of text."
    elif source.kind == "gguf":
        remedy = "It is damaged or cut off; download the GGUF file again."
    return CheckpointError(f"{name}: the {part} cannot be loaded. {reason_of(error)}. {remedy}")


_NO_TEXT = ("no language model of", "Unrecognized configuration class", "backbone weights do not fit")
"""What errors about models of images and sound say."""


def _hub_error(name: str, error: BaseException | None, part: str) -> DTFError:
    """No such repository, no access, or no network."""
    kinds, link = set[str](), error
    for _ in range(9):
        kinds.add(type(link).__name__)
        link = link and (link.__cause__ or link.__context__)
    if "GatedRepoError" in kinds:
        return HubError(
            f"{name}: access to this model is restricted; ask for it on its Hub page, then `hf auth login`."
        )
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"}:
        return CheckpointError(f"{name}: neither a path on this machine nor a {part} on the Hub; check the spelling.")
    return HubError(
        f"{name}: no such path on this machine, and the Hub cannot be reached; "
        "check the network, or give a folder or .gguf file."
    )
