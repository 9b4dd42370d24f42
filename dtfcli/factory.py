"""The one place that builds models: settings → model and tokenizer, a path → model and tokenizer.

Choices: a model from scratch starts as its dense backbone, drawn from the run's seed, whatever its architecture, so
that dtf, mod and dense start from the same function; what routing adds is drawn from a seed of its own. Weights are
loaded for training in float32; lower precision is the training loop's business.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from dtfcli.base_configs import BASE_CONFIGS
from dtfcli.devices import DTYPES, has_fast_bfloat16, resolve_device
from dtfcli.errors import CheckpointError, ConfigError, DTFError, HubError
from dtfcli.model_paths import ModelPath, resolve_model_path
from dtfcli.models.configuration_fields import DTF_ONLY, MOD_ONLY
from dtfcli.models.conversion import ROUTING_FIELD_NAMES, convert, load_dense, load_whole, routed_config
from dtfcli.settings import Settings
from dtfcli.tokenization import data_tokenizer
from dtfcli.training.adapters import apply_adapter, read_adapter_config

_SCRATCH_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def build_model(
    settings: Settings, *, tokenizer: PreTrainedTokenizerBase | None = None, meta: bool = False
) -> PreTrainedModel:
    """The model that a run starts from, in float32 on the CPU.

    Args:
        settings: `model` says what to build, `run.seed` seeds what is new.
        tokenizer: gives a model from scratch its vocabulary size and special tokens; None: as the settings say.
        meta: build on the meta device, without reading or drawing weights.

    Raises:
        ConfigError: the base cannot be routed, or is routed in another way.
        CheckpointError, HubError: the base cannot be loaded.
    """
    if meta:
        with torch.device("meta"):
            return _route(_new_dense(_dense_config(settings, tokenizer), settings), settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings.run.seed)
        if settings.model.base:
            start = _load_base(settings)
        else:
            start = _new_dense(_dense_config(settings, tokenizer), settings)
        torch.manual_seed(_routing_seed(settings.run.seed))
        model = _route(start, settings)
    _check_vocabulary(model, tokenizer, settings)
    if tokenizer is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_comparison(settings: Settings, *, dtype: torch.dtype = torch.float32) -> dict[str, PreTrainedModel]:
    """A dense model of the settings' shape with random weights, and both routed models that share them: for timing.

    Routing fields of the settings hold for the architecture they belong to.

    Raises:
        ConfigError: the shape cannot be routed so.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.run.seed)
        dense: Any = _new_dense(_dense_config(settings, None), settings)
        dense = dense.to(dtype).eval()
        models: dict[str, PreTrainedModel] = {"dense": dense}
        fields = settings.model.routing_fields()
        for architecture, foreign in (("dtf", MOD_ONLY), ("mod", DTF_ONLY)):
            chosen = {name: value for name, value in fields.items() if name not in foreign}
            try:
                models[architecture] = convert(dense, architecture, chosen.pop("capacity", 0.5), **chosen)
            except ValueError as error:
                raise ConfigError(f"model: {error}") from error
    return models


def build_tokenizer(
    settings: Settings, *, on_progress: Callable[[str, float | None], None] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: the one that `data.tokenizer` names, else the base's, else one trained on the data."""
    model = settings.model
    if settings.data.tokenizer:
        return load_tokenizer(settings.data.tokenizer, trust_remote_code=model.trust_remote_code)
    if model.base:
        return load_tokenizer(model.base, revision=model.revision or None, trust_remote_code=model.trust_remote_code)
    return data_tokenizer(
        settings.data, vocab_size=model.scratch.vocab_size, seed=settings.run.seed, on_progress=on_progress
    )


def load_model(
    path: str | Path,
    routing: str | None = None,
    capacity: float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
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

    Raises:
        CheckpointError: no model is there, or it is damaged.
        ConfigError: a routing option for a dense model, or one that the model refuses; an unknown device or dtype.
        HubError: the Hub cannot be reached.
    """
    source = resolve_model_path(path, revision)
    target = resolve_device(str(device))
    with _explained_load_errors(source):
        model = _load_weights(
            source, _load_dtype(source, dtype, target, trust_remote_code), attn_implementation, trust_remote_code
        )
    _set_routing(model, None if routing == "auto" else routing, capacity, str(path))
    return model.to(target).eval()  # type: ignore[arg-type]  # wrapped by Transformers without its types


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
    with _explained_load_errors(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(place, revision=source.revision, **options)


def _resolve_tokenizer_path(path: str | Path, revision: str | None) -> ModelPath:
    """As for a model, but a folder that holds a tokenizer alone will do."""
    folder = Path(path).expanduser()
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return ModelPath("folder", str(folder))
    return resolve_model_path(path, revision)


def _routing_seed(seed: int) -> int:
    """A seed for routers and priors that no backbone is drawn from."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def _dense_config(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The configuration of the dense backbone, without loading weights."""
    model = settings.model
    if model.base:
        return _base_config(model.base, model.revision or None, model.trust_remote_code)
    values = model.scratch.model_dump()
    family = values.pop("family")
    # No pad_token_id: its embedding would get no gradient, and end-of-text pads here.
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id")
        values |= {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}
    return _SCRATCH_CONFIGS[family](**values)


def _base_config(base: str, revision: str | None, trust_remote_code: bool) -> Any:
    source = resolve_model_path(base, revision)
    if source.kind == "hub" and source.revision is None and source.path in BASE_CONFIGS:
        return AutoConfig.for_model(**BASE_CONFIGS[source.path])
    with _explained_load_errors(source):
        if source.is_adapter and not (Path(source.path) / "config.json").is_file():
            config = read_adapter_config(Path(source.path))
            return _base_config(config["base_model_name_or_path"], config.get("revision"), trust_remote_code)
        if source.kind == "gguf":
            file = Path(source.path)
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        return AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust_remote_code)


def _new_dense(config: Any, settings: Settings) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=settings.model.attn_implementation, dtype=torch.float32
    )


def _load_base(settings: Settings) -> PreTrainedModel:
    model = settings.model
    source = resolve_model_path(model.base, model.revision or None)
    with _explained_load_errors(source):
        return _load_weights(source, torch.float32, model.attn_implementation, model.trust_remote_code)


def _load_weights(
    source: ModelPath, dtype: Any, attn_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """A model with all of its weights.

    Raises:
        ValueError: weights are missing, or are not known to the model.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if source.kind == "gguf":
        return load_dense(source.path, **options)
    adapter = _adapter_folder(source)
    if adapter is not None:
        return _load_adapter(adapter, dtype, attn_implementation, trust_remote_code)
    return load_whole(source.path, revision=source.revision, **options)


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
        with _explained_load_errors(source):
            model: Any = _load_weights(source, torch.float32, attn_implementation, trust_remote_code)
    except (CheckpointError, HubError) as error:
        raise type(error)(f"{folder}: the base model of this adapter cannot be had. {error}") from error
    own = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
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
    if not hasattr(base, "set_routing"):
        return convert(base, fields.pop("architecture"), fields.pop("capacity"), **fields)
    for name, value in fields.items():
        if name != "routing" and getattr(base.config, name) != value:
            raise ValueError(
                f"{name} = {value!r}, but its base has {getattr(base.config, name)!r}; it is another base."
            )
    base.config.routing = fields["routing"]
    return base


def _route(start: Any, settings: Settings) -> PreTrainedModel:
    """Make `start` what `model.architecture` asks for; a base that is routed already goes on as it is."""
    architecture, fields = settings.model.architecture, settings.model.routing_fields()
    if hasattr(start, "set_routing"):
        return _go_on(start, settings)
    try:
        if architecture == "dense":
            if start.config.model_type not in _SCRATCH_CONFIGS:
                routed_config(start.config)  # refuses what could not be compared with a routed model
            return start
        capacity = fields.pop("capacity", 0.5)
        return convert(start, architecture, capacity, **fields)
    except ValueError as error:
        base = settings.model.base or "model.scratch"
        raise ConfigError(f"{base} cannot become {architecture}: {error}.") from error


def _go_on(model: Any, settings: Settings) -> PreTrainedModel:
    """Check that a routed base is routed as the settings say.

    Raises:
        ConfigError: it is of another architecture or differs in a field.
    """
    base, wanted, found = settings.model.base, settings.model.architecture, model.config.architecture
    if wanted != found:
        raise ConfigError(
            f"model.base = {base!r} is a {found} model: train it with model={found}, or take a dense model as the base."
        )
    fields = settings.model.routing_fields()
    routing = fields.pop("routing", None)
    for name, value in fields.items():
        if value != getattr(model.config, name):
            raise ConfigError(
                f"model.{name} = {value!r}: model.base = {base!r} has {getattr(model.config, name)!r}; leave it out."
            )
    if routing is not None:
        model.set_routing(routing)
    return model


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase | None, settings: Settings) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise ConfigError(
            f"data.tokenizer = {settings.data.tokenizer!r} has {len(tokenizer)} tokens, the model's vocabulary {rows}; "
            "use the tokenizer that the model was trained with."
        )


def _load_dtype(source: ModelPath, dtype: str | torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r}: choose one of auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if source.kind == "gguf" or source.is_adapter:
        return torch.float32
    own = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust_remote_code).dtype
    slow_half = own == torch.bfloat16 and not has_fast_bfloat16(device)
    if own is None or slow_half or (own == torch.float16 and device.type == "cpu"):
        return torch.float32
    return own


def _set_routing(model: Any, routing: str | None, capacity: float | None, path: str) -> None:
    if routing is None and capacity is None:
        return
    if not hasattr(model, "set_routing"):
        name, value = ("routing", routing) if routing is not None else ("capacity", capacity)
        raise ConfigError(f"{name} = {value!r}: {path} is a dense model, which routes nothing; leave it out.")
    try:
        model.set_routing(routing or model.routing, capacity)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep Transformers and accelerate from writing their own bars and remarks to stderr."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    accelerate_logger = logging.getLogger("accelerate")
    level = accelerate_logger.level
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    accelerate_logger.setLevel(logging.ERROR)
    # The bar of dequantization has no switch.
    modeling_gguf_pytorch_utils.tqdm = partial(gguf_bar, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        accelerate_logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _explained_load_errors(source: ModelPath, what: str = "model") -> Iterator[None]:
    """Turn what Transformers, safetensors and the Hub's client raise into one line; keep them quiet meanwhile.

    Raises:
        CheckpointError: the user named something that is not there or cannot be used.
        HubError: the Hub could not be reached.
    """
    try:
        with quiet_libraries():
            yield
    except DTFError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        name = source.path if source.revision is None else f"{source.path}@{source.revision}"
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if source.kind == "hub" and isinstance(error, OSError):
            raise _hub_error(name, error, what) from error
        if isinstance(error, json.JSONDecodeError):
            reason = f"its config.json is no JSON ({reason})"
        raise CheckpointError(f"{name}: the {what} cannot be loaded. {reason}") from error


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
