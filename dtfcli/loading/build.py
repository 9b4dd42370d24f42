"""Settings → model and tokenizer: the start of a run.

Choices: a model from scratch starts as its dense backbone, drawn from the run's seed, whatever its architecture, so
that dtf, mod and dense start from the same function; the parts that routing adds have a seed of their own. Weights are
loaded for training in float32; lower precision is the training loop's business.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from dtfcli.data.tokenizer import data_tokenizer
from dtfcli.errors import ConfigError
from dtfcli.loading.base_configs import BASE_CONFIGS
from dtfcli.loading.load import explained_load_errors, load_tokenizer, load_weights
from dtfcli.loading.source import ModelSource, open_source
from dtfcli.models.configuration_fields import unread_fields
from dtfcli.models.conversion import convert, from_config, routed_config
from dtfcli.models.families import FAMILIES
from dtfcli.models.modeling_routed_mlp import routed_mlps
from dtfcli.models.pretrained import is_routed
from dtfcli.settings import Settings


def build_model(
    settings: Settings, *, tokenizer: PreTrainedTokenizerBase | None = None, meta: bool = False
) -> PreTrainedModel:
    """The model that a run starts from, in float32 on the CPU.

    Args:
        settings: `model` names the model, `run.seed` seeds new weights.
        tokenizer: gives a model from scratch its vocabulary size and special tokens; None: as the settings say.
        meta: build on the meta device, without reading or drawing weights.

    Raises:
        ConfigError: the base cannot be routed, or is routed in another way.
        CheckpointError, HubError: the base cannot be loaded.
    """
    if meta:
        with torch.device("meta"):
            return _route(_random_dense(settings, tokenizer), settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings.run.seed)
        base = _base(settings)
        if base is None:
            start = _random_dense(settings, tokenizer)
        else:
            with explained_load_errors(base):
                start = load_weights(base, torch.float32, settings.model.attn_implementation)
        torch.manual_seed(_routing_seed(settings.run.seed))
        model = _route(start, settings)
    _check_vocabulary(model, tokenizer, settings)
    if tokenizer is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_comparison(settings: Settings, *, dtype: torch.dtype = torch.float32) -> dict[str, PreTrainedModel]:
    """A dense model of the settings' shape with random weights, and routed models that share them: for timing.

    Routing fields of the settings hold for the architecture they belong to.

    Raises:
        ConfigError: the shape cannot be routed so.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.run.seed)
        dense: Any = _random_dense(settings, None)
        dense = dense.to(dtype).eval()
        models: dict[str, PreTrainedModel] = {"dense": dense}
        fields = settings.model.routing_fields()
        for architecture in dict.fromkeys(["dtf", "mod", settings.model.architecture]):
            if architecture == "dense":
                continue
            unread = unread_fields({**fields, "architecture": architecture})
            chosen = {name: value for name, value in fields.items() if name not in unread}
            try:
                models[architecture] = convert(dense, architecture, **chosen)
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


def _routing_seed(seed: int) -> int:
    """A seed for routers and priors that no backbone is drawn from."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def _base(settings: Settings) -> ModelSource | None:
    """The model that a run starts from; None: random weights."""
    model = settings.model
    if not model.base:
        return None
    return open_source(model.base, model.revision or None, trust_remote_code=model.trust_remote_code)


def _random_dense(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """The dense backbone with random weights, or with none on the meta device."""
    base, kernel = _base(settings), settings.model.attn_implementation
    with nullcontext() if base is None else explained_load_errors(base):
        config = _scratch_config(settings, tokenizer) if base is None else known_config(base)
        return from_config(config, attn_implementation=kernel, dtype=torch.float32)


def known_config(source: ModelSource) -> Any:
    """The configuration of a model: our own copy if we have it, so that a dry run needs no network."""
    if source.kind == "hub" and source.revision is None and source.path in BASE_CONFIGS:
        return AutoConfig.for_model(**BASE_CONFIGS[source.path], dtype="bfloat16")
    return source.configuration


def _scratch_config(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    values = settings.model.scratch.model_dump()
    family = values.pop("family")
    # No pad_token_id: its embedding would get no gradient, and end-of-text pads here.
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id")
        values |= {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}
    return FAMILIES[family].dense_config(**values)


def _route(start: Any, settings: Settings) -> PreTrainedModel:
    """Make `start` a model of the architecture `model.architecture`; a routed base stays as it is."""
    architecture, fields = settings.model.architecture, settings.model.routing_fields()
    if is_routed(start):
        return _learning(_go_on(start, settings))
    try:
        if architecture == "dense":
            if start.config.model_type not in FAMILIES:
                routed_config(start.config)  # refuses what could not be compared with a routed model
            return start
        return _learning(convert(start, architecture, **fields))
    except ValueError as error:
        base = settings.model.base or "model.scratch"
        raise ConfigError(f"{base} cannot become {architecture}: {error}.") from error


def _learning(model: PreTrainedModel) -> PreTrainedModel:
    """A routed model in which those parts of routed MLPs that only choose, and are fitted, take no gradient."""
    for mlp in routed_mlps(model).values():
        for name, parameter in mlp.named_parameters():
            parameter.requires_grad_(not name.startswith(("router.", "forecast.centers")))
    return model


def _go_on(model: Any, settings: Settings) -> PreTrainedModel:
    """A routed base; ConfigError if its architecture or another field differs from the settings."""
    base, architecture = settings.model.base, model.config.architecture
    if settings.model.architecture != architecture:
        raise ConfigError(
            f"model.base = {base!r} is a {architecture} model: train it with model={architecture}, or take a dense "
            "model as the base."
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
