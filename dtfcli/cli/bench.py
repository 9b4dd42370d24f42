"""`dtf bench`: time and memory of routed models next to dense."""

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
MicroBatches = Annotated[
    int, typer.Option("--micro-batches", min=1, help="Of an update in training: a step is the mean of one.")
]
Stock = Annotated[
    bool,
    typer.Option("--stock", help="Also train the dense model as Transformers does, with whole logits: much memory."),
]
Static = Annotated[
    bool,
    typer.Option("--static", help="Decode with a static cache, on a GPU by a CUDA graph: every layer is computed."),
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
    micro_batches: MicroBatches = 1,
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
      dtf bench quickstart --phases train --threads 1 --seq-len 1024 --batch 2 model.scratch.hidden_size=768
      dtf bench dtf-qwen2.5-0.5b model.dense_edges=0 --dtype float32 --phases decode
      dtf bench outputs/2026-01-31/quickstart --capacities 0.75,0.5,0.25 --json
    """
    from dtfcli.bench.report import BenchOptions
    from dtfcli.bench.run import bench as measure
    from dtfcli.cli import bench_view, render

    names = _phases(phases, stock, static)
    if triton and not static:
        raise ConfigError("--triton: our kernel works with a static cache; add --static, or leave it out.")
    source, overrides = options.split_preset(arguments)
    models = _Models(source or "quickstart", overrides, loading)
    _use_threads(threads)
    bench_options = BenchOptions(
        capacities=_capacities(capacities),
        phases=names,
        dtype=models.precision(loading.dtype, names),
        seq_len=seq_len,
        batch=batch,
        new_tokens=new_tokens,
        repeats=repeats,
        calibration_tokens=calibration_tokens,
        micro_batches=micro_batches,
        stock=stock,
        static=static,
        triton=triton,
        **models.chosen(),
    )
    show: Any = render.emit_json if json else bench_view.show
    show(measure(models, bench_options, render.note))


class _Models:
    """What is measured: a preset's shape with random weights, or a trained model beside its own dense backbone.

    Attributes:
        settings: of the preset; None for a trained model.
    """

    def __init__(self, source: str, overrides: list[str], loading: options.Loading) -> None:
        """Resolve the source and the device; nothing is built yet."""
        from dtfcli.loading.devices import resolve_device
        from dtfcli.settings import load_settings, sources

        is_preset = source in sources.preset_names()
        if overrides and not is_preset:
            raise ConfigError(f"{overrides[0]}: settings go with a preset; {source} is a model.")
        self.settings = load_settings(source, overrides) if is_preset else None
        self._source, self._loading = source, loading
        self._device = resolve_device(loading.device)

    def precision(self, dtype: str, phases: list[str]) -> "torch.dtype":
        """That of a name, on this device."""
        import torch

        from dtfcli.loading.devices import compute_dtype

        chosen = compute_dtype(dtype, self._device)
        if "train" in phases and chosen == torch.float16:
            raise ConfigError("--dtype float16: training is measured in bfloat16 or float32; choose one of them.")
        return chosen

    def chosen(self) -> dict[str, Any]:
        """What the settings of a preset say of compiling and kernels."""
        if self.settings is None:
            return {}
        return {"compiled": self.settings.training.compile, "kernels": self.settings.training.kernels}

    def __call__(self, dtype: "torch.dtype") -> dict[str, Any]:
        """The models by name, "dense" among them, sharing weights of this dtype."""
        import torch

        from dtfcli.loading.build import build_comparison

        if self.settings is None:
            built = self._trained(dtype)
        else:
            with torch.device(self._device):  # a processor takes minutes to draw billions of numbers
                built = dict(build_comparison(self.settings, dtype=dtype))
        return {name: model.to(self._device) for name, model in built.items()}

    def _trained(self, dtype: "torch.dtype") -> dict[str, Any]:
        from dtfcli.loading.load import load_model
        from dtfcli.loading.source import open_source
        from dtfcli.models.conversion import to_dense
        from dtfcli.models.pretrained import is_routed

        trust = self._loading.trust_remote_code
        source = open_source(self._source, self._loading.revision, trust_remote_code=trust)
        model: Any = load_model(source, device="cpu", dtype=dtype)
        if not is_routed(model):
            raise ConfigError(f"{self._source} is a dense model: give a routed one, or a preset.")
        return {"dense": to_dense(model), model.config.architecture: model}


def _use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _phases(text: str, stock: bool, static: bool) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in PHASES:
            raise ConfigError(f"--phases {name}: choose from {', '.join(PHASES)}.{did_you_mean(name, PHASES)}")
    if stock and "train" not in names:
        raise ConfigError("--stock is about training steps: add train to --phases, or leave it out.")
    if static and "decode" not in names:
        raise ConfigError("--static is about decoding: add decode to --phases, or leave it out.")
    return names


def _capacities(text: str) -> list[float]:
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0.0 < share <= 1.0 for share in shares):
        raise ConfigError(f"--capacities {text}: numbers above 0 and at most 1 with commas, such as 0.5,0.25.")
    return shares
