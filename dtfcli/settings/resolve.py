"""From presets, files, environment and overrides to one table of settings, without losing where a value came from.

Three rules: no setting of the user is ignored (a key that nothing would read is refused), a preset gives way to it
(`dtf train quickstart model=mod` drops the keys that only DTF reads), and all mistakes are reported together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dtfcli.models.configuration_fields import RoutingFields, has_routed_mlps, unread_fields, with_defaults
from dtfcli.settings import describe
from dtfcli.settings.sources import (
    environment_name,
    lookup,
    merge,
    parse_environment,
    parse_overrides,
    preset_names,
    read_preset,
    read_toml,
    remove,
)

ROUTING_NAMES = tuple(f.name for f in fields(RoutingFields) if f.name != "architecture")
"""The `model.*` keys that come from `RoutingFields`."""

_SWITCHED = {
    "lora": ("r", "alpha", "dropout", "targets", "quantize", "merge"),
    "distill": ("weight", "lm_weight", "temperature"),
    "logging.wandb": ("project",),
}
"""Groups with a switch, `enabled`, and the keys that are read only while it is on."""

S = TypeVar("S", bound=BaseModel)

_ROUTER_KEYS = ("training.learning_rates.router", "training.decay_router_scalars")
_OTHER_KEYS = ("training.capacity_schedule", "training.fit_tokens")
_TOKEN_KEYS = ("training.calibration_tokens", "training.threshold_fraction")
_NO_ROUTER = {"random": _ROUTER_KEYS, "layerdrop": (*_ROUTER_KEYS, *_TOKEN_KEYS)}
_NO_BLOCKS = (*_ROUTER_KEYS, "training.threshold_fraction", "training.capacity_schedule")


def _unread_of_model(model: Mapping[str, Any]) -> dict[str, str]:
    """The keys that are not read because of `model.*`, each with the reason."""
    architecture = model.get("architecture") or "dtf"
    if architecture == "dense":
        names = [f"model.{name}" for name in ROUTING_NAMES]
        rates = [f"training.learning_rates.{name}" for name in ("prior", "forecast")]
        keys = [*names, *rates, *_OTHER_KEYS, *_ROUTER_KEYS, *_TOKEN_KEYS]
        return dict.fromkeys(keys, "model.architecture is dense")
    unread, mlps = {f"model.{name}": reason for name, reason in unread_fields(model).items()}, has_routed_mlps(model)
    if "model.prior_factor" in unread:
        unread["training.learning_rates.prior"] = unread["model.prior_factor"]
    if with_defaults(model)["bypass"] != "forecast":
        unread["training.learning_rates.forecast"] = "model.bypass is identity"
        if "model.explore" in unread:
            unread["training.fit_tokens"] = "there is no forecast to fit, and no score that predicts"
    unread |= dict.fromkeys(_NO_ROUTER.get(architecture, ()), f"model.architecture is {architecture}")
    if mlps:
        reason = "model.routed_part is mlp: scores are fitted, and training routes by threshold at model.capacity"
        unread |= dict.fromkeys(_NO_BLOCKS, reason)
    return unread


def unread_keys(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys that nothing would read under these settings, each with the reason.

    Those of the user are refused, those of a preset give way, and `Settings.to_toml` leaves them out.
    """
    model = lookup(values, "model") or {}
    unread = _unread_of_model(model)

    def when(condition: Any, reason: str, *keys: str) -> None:
        unread.update(dict.fromkeys(keys, reason) if condition else {})

    base, tokenizer, steps = (lookup(values, key) for key in ("model.base", "data.tokenizer", "training.max_steps"))
    no_predictor = not lookup(values, "model.predictor_loss_weight")
    when(no_predictor, "model.predictor_loss_weight is 0", "training.learning_rates.predictor")
    layers = with_defaults(model)["routed_layers"]
    when(isinstance(layers, list), "model.routed_layers lists the layers", "model.dense_edges")
    when(layers == "inner", "model.routed_layers is inner", "model.dense_edges")
    when(base, f"the model starts from model.base = {base}", "model.scratch")
    when(not base, "model.base is empty", "model.revision", "model.trust_remote_code")
    when(not base and not has_routed_mlps(model), "model.base is empty", "training.fit_tokens")
    when(not base and tokenizer, f"data.tokenizer = {tokenizer} has its own", "model.scratch.vocab_size")
    sources = lookup(values, "data.sources") or ()
    streams = any(isinstance(source, Mapping) and source.get("streaming") for source in sources)
    when(streams, "data.sources stream", "data.max_documents")
    when(streams, "data.sources stream, which has no end", "training.epochs")
    when(not streams, "no entry of data.sources has streaming = true", "data.shuffle_buffer")
    when(steps is not None, f"training.max_steps = {steps} is set", "training.epochs")
    unmeasured = lookup(values, "data.validation_fraction") == 0
    when(unmeasured, "data.validation_fraction is 0", "data.validation_blocks", "training.eval_every")
    constant = lookup(values, "training.capacity_schedule") in (None, "constant")
    keys = ("training.capacity_start", "training.capacity_fraction")
    when(constant, "training.capacity_schedule is constant", *keys)
    for group, names in _SWITCHED.items():
        off = not lookup(values, f"{group}.enabled")
        when(off, f"{group}.enabled is false", *(f"{group}.{name}" for name in names))
    when(not lookup(values, "eval.after"), "eval.after is empty", "eval.tasks", "eval.limit", "eval.data_dir")
    when(not lookup(values, "hub.repo"), "hub.repo is empty", "hub.private")
    return unread


class Sources:
    """The sources of a run's settings, kept apart so that a mistake can be traced to where it was made."""

    def __init__(
        self, settings: type[BaseModel], preset: str | None, overrides: Sequence[str], config: Path | None
    ) -> None:
        """Read all sources. Raises ConfigError if one cannot be read."""
        text = partial(describe.wants_text, settings)
        self.overrides = parse_overrides(overrides, text)
        self.environment = parse_environment(text)
        self.config_path = config
        self.config = read_toml(config) if config else {}
        self.user = merge(merge(self.config, self.environment), self.overrides)
        self.preset_name = preset or self._default_preset()
        self.preset = read_preset(self.preset_name) if self.preset_name else {}
        self._let_preset_give_way()

    def _default_preset(self) -> str | None:
        """`<architecture>-qwen2.5-0.5b`; none under a file that names its model: such a file is complete."""
        if any(lookup(self.config, key) is not None for key in ("model.base", "model.scratch")):
            return None
        name = f"{lookup(self.user, 'model.architecture') or 'dtf'}-qwen2.5-0.5b"
        return name if name in preset_names() else "dtf-qwen2.5-0.5b"

    def _let_preset_give_way(self) -> None:
        """Drop from the preset the keys that the user's choices made meaningless."""
        if lookup(self.user, "training.epochs") is not None and lookup(self.user, "training.max_steps") is None:
            remove(self.preset, "training.max_steps")
        for key in unread_keys(self.merged()):
            remove(self.preset, key)

    def merged(self) -> dict[str, Any]:
        """All sources in one table."""
        return merge(self.preset, self.user)

    def origin(self, key: str) -> str:
        """Where the value of `key` came from, for error messages; empty for an override."""
        key = key.partition("[")[0]
        if lookup(self.overrides, key) is not None:
            return ""
        if lookup(self.environment, key) is not None:
            return f" (from {environment_name(key)})"
        if lookup(self.config, key) is not None:
            return f" (in {self.config_path})"
        return f" (in preset {self.preset_name})" if lookup(self.preset, key) is not None else ""


def resolve(settings: type[S], sources: Sources) -> tuple[S | None, list[str]]:
    """Build the settings; with mistakes, None and one line for each.

    A key that is wrong is taken out and the rest checked again, so that one mistake does not hide the next.
    Checks across keys count only while no known key had to be taken out.
    """
    values = sources.merged()
    lines = []
    for key, reason in unread_keys(values).items():
        if lookup(sources.user, key) is not None:
            value = describe.show_value(lookup(sources.user, key))
            lines.append(f"{key} = {value}{sources.origin(key)}: nothing reads it, since {reason}. Leave it out.")
            remove(values, key)
    tainted = False
    while True:
        try:
            built = settings.model_validate(values)
            return (None if lines else built), lines
        except ValidationError as error:
            problems = describe.problems(settings, error, sources.origin)
        lines += [problem.text for problem in problems if not (problem.crosses and tainted)]
        tainted = tainted or any(problem.known for problem in problems)
        if not all(remove(values, problem.key) for problem in problems):
            return None, lines
