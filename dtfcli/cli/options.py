"""Options that several commands share, and what completes them.

A command that opens a MODEL has a parameter `loading: Loading` and the decorator `opens_models`, which puts the options
of `Loading` in its place: spelled and explained the same everywhere.
"""

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dtfcli.errors import ConfigError
from dtfcli.settings import sources

if TYPE_CHECKING:
    from dtfcli.loading.source import ModelSource


def _common(name: str, text: str, **more: Any) -> Any:
    """An option that every command with a model takes."""
    return typer.Option(name, help=text, rich_help_panel="Options every command with a model takes", **more)


def share(name: str) -> Callable[[str], float]:
    """What reads an option's share: 80% or 0.8."""

    def read(text: str) -> float:
        number = text.strip().removesuffix("%")
        try:
            return float(number) / (100 if "%" in text else 1)
        except ValueError:
            raise ConfigError(f"{name} {text}: a share; write 80% or 0.8.") from None

    return read


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=(
            "A model folder, a run folder (its final model), an adapter folder, a .gguf file, or a Hub id with or "
            "without @revision."
        ),
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Device = Annotated[str, _common("--device", "auto (the best available), cpu, cuda, cuda:1, mps or xpu.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _common("--dtype", "Precision of the weights; auto: by the model and the device."),
]
AttnImplementation = Annotated[
    Literal["sdpa", "eager", "flash_attention_2"] | None,
    _common(
        "--attn-implementation",
        "Attention kernel; flash_attention_2 needs a GPU. Unset: sdpa where the model has it, else eager.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    _common("--revision", "Branch, tag or commit of a Hub model.", metavar="REVISION", show_default=False),
]
TrustRemoteCode = Annotated[
    bool, _common("--trust-remote-code", "Run code that comes with the model; this package's own models need none.")
]
Routing = Annotated[
    Literal["auto", "threshold", "predictor", "topk"],
    _common(
        "--routing",
        "auto: the checkpoint's own mode; threshold, predictor: causal; topk: the training rule, not causal.",
    ),
]
Capacity = Annotated[
    float | None,
    _common(
        "--capacity",
        "Share γ of the tokens that a routed layer processes, such as 80% or 0.8; unset: the checkpoint's own.",
        metavar="γ",
        parser=share("--capacity"),
        show_default=False,
    ),
]
Quantize = Annotated[
    Literal["int8"] | None,
    _common(
        "--quantize",
        "Hold the backbone's projections in 8 bits a weight, and print the cost. Routers and thresholds stay as they "
        "are.",
        show_default=False,
    ),
]


def complete_preset(incomplete: str) -> list[tuple[str, str]]:
    """Preset names with their summaries."""
    names = [name for name in sources.preset_names() if name.startswith(incomplete)]
    return [(name, sources.preset_summary(name)) for name in names]


def complete_preset_or_setting(incomplete: str) -> list[tuple[str, str]]:
    """Preset names and the keys of settings, for `dtf train`."""
    from dtfcli.settings import Settings
    from dtfcli.settings.describe import walk

    keys = [(f"{key}=", field.description or "") for key, field in walk(Settings) if "[]" not in key]
    return complete_preset(incomplete) + [item for item in keys if item[0].startswith(incomplete)]


def split_preset(arguments: Iterable[str] | None) -> tuple[str | None, list[str]]:
    """Split `[PRESET] [KEY=VALUE …]`: a first argument without "=" names the preset."""
    items = list(arguments or ())
    if items and "=" not in items[0]:
        return items[0], items[1:]
    return None, items


@dataclass(frozen=True)
class Loading:
    """How a command opens its models; each field is an option."""

    routing: Routing = "auto"
    capacity: Capacity = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    attn_implementation: AttnImplementation = None
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    quantize: Quantize = None

    def open(self, model: "str | ModelSource") -> tuple[Any, Any]:
        """Model and tokenizer; the cost of quantizing goes to stderr. Imports torch and Transformers."""
        from dtfcli.loading.load import load_model_and_tokenizer
        from dtfcli.loading.source import open_source

        arguments = asdict(self)
        kind, trust, revision = (arguments.pop(name) for name in ("quantize", "trust_remote_code", "revision"))
        source = open_source(model, revision, trust_remote_code=trust) if isinstance(model, str) else model
        if kind is None:
            return load_model_and_tokenizer(source, **arguments)
        from dtfcli.cli import render
        from dtfcli.cost.quantized import in_words, load_quantized

        loaded, tokenizer = load_quantized(source, kind, **arguments)
        render.note(f"{source.path}: {in_words(loaded.quantization)}")
        return loaded, tokenizer


def opens_models(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `Loading`, except those left out, in the place of its parameter `loading`."""
    chosen = [field for field in fields(Loading) if field.name not in left_out]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in chosen
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def with_options(**arguments: Any) -> None:
            loading = Loading(**{field.name: arguments.pop(field.name) for field in chosen})
            command(loading=loading, **arguments)

        signature, parameters = inspect.signature(command), list[inspect.Parameter]()
        for parameter in signature.parameters.values():
            given = options if parameter.name == "loading" else [parameter]
            parameters += [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in given]
        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


def new_file(name: str, text: str, suffix: str = "") -> Any:
    """An option that names a file to write, with this suffix; refuses a wrong one before anything is loaded."""

    def check(path: Path | None) -> Path | None:
        if path is None:
            return None
        given = f"{name} {path}"
        if suffix and path.suffix.lower() != suffix:
            raise ConfigError(f"{given}: name a {suffix} file.")
        if path.is_dir():
            raise ConfigError(f"{given}: is a folder; name a file.")
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{given}: exists already; name another file.")
        if not path.parent.is_dir():
            raise ConfigError(f"{given}: the folder {path.parent} does not exist; make it first.")
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{given}: no permission to write into {path.parent}; name another folder.")
        return path

    return typer.Option(name, help=text, show_default=False, callback=check)
