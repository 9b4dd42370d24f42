"""`dtf bench`: time and memory of routed models next to dense."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

PHASES = ("train", "prefill", "decode")
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PRESET|MODEL] [KEY=VALUE]...",
        help="A preset, whose shape is built with random weights, or a trained routed model.",
        autocompletion=options.complete_preset_or_setting,
        show_default=False,
    ),
]
Phases = Annotated[str, typer.Option("--phases", help="Any of train, prefill and decode, with commas.")]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of a row, or of the prompt.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Rows.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens decoded after the prompt.")]
Capacities = Annotated[str, typer.Option("--capacities", help="Capacities γ to measure, with commas.")]
Repeats = Annotated[
    int, typer.Option("--repeats", min=1, help="Training steps and prefill passes of each model, in turns.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of a CPU; all cores unless given.")]
Stock = Annotated[bool, typer.Option("--stock", help="Also train the dense model as Transformers does: much memory.")]
Static = Annotated[
    bool, typer.Option("--static", help="Decode with a static cache, on a GPU by a CUDA graph: all layers compute.")
]
Triton = Annotated[
    bool,
    typer.Option(
        "--triton",
        help="Decode with our own kernel, on a GPU: with --static, no weights are read of a layer that no row enters.",
    ),
]
CalibrationTokens = Annotated[
    int, typer.Option("--calibration-tokens", min=64, help="Random tokens that thresholds are measured on.")
]


@options.opens_models("routing", "capacity", "attn_implementation", "quantize")
def bench(
    arguments: Arguments = None,
    phases: Phases = "train,prefill,decode",
    seq_len: SeqLen = 512,
    batch: Batch = 1,
    new_tokens: NewTokens = 64,
    capacities: Capacities = "0.5,0.125",
    repeats: Repeats = 7,
    threads: Threads = None,
    stock: Stock = False,
    static: Static = False,
    triton: Triton = False,
    calibration_tokens: CalibrationTokens = 4096,
    *,
    loading: options.Loading,
    json: options.Json = False,
) -> None:
    """Measure training steps, prefill and decoding of DTF and MoD against their own dense backbone, in one process.

    Models take turns; times are medians; ratios are to dense. Next to each time ratio stands the ratio of the
    computation alone: FLOPs in training and prefill, weights read in decoding, at the share of tokens really routed.
    A training step is forward and backward as `dtf train` runs them; the optimizer, equal for all, is timed apart.

    \b
    Examples:
      dtf bench quickstart
      dtf bench quickstart --phases train --threads 1 --seq-len 1024 --batch 2
      dtf bench dtf-qwen2.5-0.5b model.capacity=0.6 --phases decode
      dtf bench outputs/2026-01-31/quickstart --capacities 0.75,0.5,0.25 --json
    """
    import torch

    from dtfcli.bench.report import BenchOptions
    from dtfcli.bench.run import bench as measure
    from dtfcli.cli import bench_view, render
    from dtfcli.loading.devices import compute_dtype, resolve_device

    if threads is not None:
        torch.set_num_threads(threads)
    source, overrides = options.split_preset(arguments)
    from_settings, models = _models(source or "quickstart", overrides, loading)
    bench_options = BenchOptions(
        capacities=_capacities(capacities),
        phases=_phases(phases, loading.dtype, stock=stock, static=static, triton=triton),
        dtype=compute_dtype(loading.dtype, resolve_device(loading.device)),
        seq_len=seq_len,
        batch=batch,
        new_tokens=new_tokens,
        repeats=repeats,
        calibration_tokens=calibration_tokens,
        stock=stock,
        static=static,
        triton=triton,
        **from_settings,
    )
    with render.Steps() as show:
        report = measure(models, bench_options, show)
    render.emit_json(report) if json else bench_view.show(report)


def _models(
    source: str, overrides: list[str], loading: options.Loading
) -> tuple[dict[str, Any], Callable[["torch.dtype"], dict[str, Any]]]:
    """The models to measure: a preset's shape with random weights, or a trained model and its own dense backbone.

    Returns:
        Compiling and kernels, by the preset; and a function that makes the models with weights of a dtype, by name,
        "dense" among them.
    """
    import torch

    from dtfcli.loading.build import build_comparison
    from dtfcli.loading.devices import resolve_device
    from dtfcli.loading.load import load_model
    from dtfcli.models.conversion import to_dense
    from dtfcli.models.pretrained import is_routed
    from dtfcli.settings import load_settings, sources

    device = resolve_device(loading.device)
    if source in sources.preset_names():
        settings = load_settings(source, overrides)

        def build(dtype: torch.dtype) -> dict[str, Any]:
            with torch.device(device):  # a processor takes minutes to draw billions of numbers
                models: dict[str, Any] = dict(build_comparison(settings, dtype=dtype))
            return {name: model.to(device) for name, model in models.items()}

        return {"compiled": settings.training.compile, "kernels": settings.training.kernels}, build
    if overrides:
        raise ConfigError(f"{overrides[0]}: settings go with a preset; {source} is a model.")

    def load(dtype: torch.dtype) -> dict[str, Any]:
        trust = loading.trust_remote_code
        model: Any = load_model(source, device="cpu", dtype=dtype, revision=loading.revision, trust_remote_code=trust)
        if not is_routed(model):
            raise ConfigError(f"{source} is a dense model: give a routed one, or a preset.")
        dense: Any = to_dense(model)
        return {"dense": dense.to(device), model.config.architecture: model.to(device)}

    return {}, load


def _phases(text: str, dtype: str, *, stock: bool, static: bool, triton: bool) -> list[str]:
    """The phases to measure; refuses options that belong to another one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in PHASES:
            raise ConfigError(f"--phases {name}: choose from {', '.join(PHASES)}.{did_you_mean(name, PHASES)}")
    for option, given, phase in (("--stock", stock, "train"), ("--static", static, "decode")):
        if given and phase not in names:
            raise ConfigError(f"{option} is about the phase {phase}: add it to --phases, or leave {option} out.")
    if triton and not static:
        raise ConfigError("--triton: our kernel works with a static cache; add --static, or leave it out.")
    if "train" in names and dtype == "float16":
        raise ConfigError("--dtype float16: training is measured in bfloat16 or float32; choose one of them.")
    return names


def _capacities(text: str) -> list[float]:
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0.0 < share <= 1.0 for share in shares):
        raise ConfigError(f"--capacities {text}: numbers above 0 and at most 1 with commas, such as 0.5,0.25.")
    return shares
