"""`dtf bench`: time and memory of routed models next to dense."""

from typing import Annotated, Any

import typer

from dtfcli.cli import options

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
CalibrationTokens = Annotated[
    int, typer.Option("--calibration-tokens", min=64, help="Random tokens that thresholds are measured on.")
]


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
    calibration_tokens: CalibrationTokens = 4096,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Measure training steps, prefill and decoding of DTF and MoD against their own dense backbone, in one process.

    Models take turns; times are medians; ratios are to dense. Next to each time ratio stands what the computation alone
    would give: FLOPs in training and prefill, weights read in decoding, at the share of tokens that was really routed.
    A training step is forward and backward as `dtf train` runs them; the optimizer, equal for all, is timed apart.

    \b
    Examples:
      dtf bench quickstart
      dtf bench quickstart --phases train --threads 1 --seq-len 1024 --batch 2 model.scratch.hidden_size=768
      dtf bench dtf-qwen2.5-0.5b model.dense_edges=0 --dtype float32 --phases decode
      dtf bench outputs/2026-01-31/quickstart --capacities 0.75,0.5,0.25 --json
    """
    from dtfcli.cli import render
    from dtfcli.errors import ConfigError, did_you_mean
    from dtfcli.settings import presets

    chosen_phases = [name.strip() for name in phases.split(",") if name.strip()]
    for name in chosen_phases or [phases]:
        if name not in PHASES:
            raise ConfigError(f"--phases {name}: choose from {', '.join(PHASES)}.{did_you_mean(name, PHASES)}")
    if stock and "train" not in chosen_phases:
        raise ConfigError("--stock is about training steps: add train to --phases, or leave it out.")
    shares = _capacities(capacities)
    source, overrides = options.split_preset(arguments)
    source = source or "quickstart"

    import dataclasses

    import torch

    from dtfcli.loading.devices import compute_dtype, keep_freed_memory, resolve_device

    place = resolve_device(device)
    precision = compute_dtype(dtype, place)
    if "train" in chosen_phases and precision == torch.float16:
        raise ConfigError("--dtype float16: training steps are measured in bfloat16 or float32; choose one of them.")
    if threads is not None:
        torch.set_num_threads(threads)
    settings = None
    if source in presets.preset_names():
        from dtfcli.settings import load_settings

        settings = load_settings(source, overrides)

    def models(weights: torch.dtype) -> dict[str, Any]:
        if settings is None:
            built = _trained(source, overrides, weights, revision, trust_remote_code)
        else:
            from dtfcli.loading.build import build_comparison

            built = dict(build_comparison(settings, dtype=weights))
        return {name: model.to(place) for name, model in built.items()}

    training: list[Any] = []
    if "train" in chosen_phases:
        if place.type == "cpu":
            keep_freed_memory()  # as `dtf train` does
        from dtfcli.bench.steps import bench_training

        routed = models(torch.float32)
        training = bench_training(
            routed.pop("dense"),
            routed,
            capacities=shares,
            dtype=precision,
            seq_len=seq_len,
            batch=batch,
            repeats=repeats,
            stock=stock,
            compiled=settings is not None and settings.training.compile,
            kernels="torch" if settings is None else settings.training.kernels,
            micro_batches=micro_batches,
            on_progress=render.note,
        )
    from dtfcli.bench.inference import bench as measure

    inference = [name for name in chosen_phases if name != "train"]
    routed = models(precision)
    dense = routed.pop("dense")
    if inference:
        # Scores change with the position: rows twice as long have the decoded tokens in their middle.
        length = 2 * seq_len + new_tokens if "decode" in inference else seq_len
        _calibrate(routed, shares, length, calibration_tokens)
    report = measure(
        dense,
        routed,
        capacities=shares,
        phases=inference,
        seq_len=seq_len,
        batch=batch,
        new_tokens=new_tokens,
        repeats=repeats,
        on_progress=render.note,
    )
    report = dataclasses.replace(report, training=training)
    if json:
        render.emit_json(report)
        return
    _show(report)


def _calibrate(routed: dict[str, Any], shares: list[float], length: int, calibration_tokens: int) -> None:
    """Measure the thresholds of random models, or again those of trained ones, on random tokens."""
    import torch

    from dtfcli.cli import render
    from dtfcli.models.routers import CAPACITY_GRID

    render.note(f"calibrating {', '.join(routed)} on {calibration_tokens} random tokens")
    length = min(length, calibration_tokens)
    vocabulary = next(iter(routed.values())).config.vocab_size
    ids = torch.randint(
        0, vocabulary, (max(1, calibration_tokens // length), length), generator=torch.Generator().manual_seed(1)
    )
    grid = [share for share in CAPACITY_GRID if share in shares]
    for model in routed.values():
        model.calibrate([{"input_ids": row.unsqueeze(0)} for row in ids], capacities=grid if grid == shares else None)


def _capacities(text: str) -> list[float]:
    from dtfcli.errors import ConfigError

    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0.0 < share <= 1.0 for share in shares):
        raise ConfigError(f"--capacities {text}: numbers above 0 and at most 1 with commas, such as 0.5,0.25.")
    return shares


def _trained(source: str, overrides: list[str], dtype: Any, revision: str | None, trust: bool) -> dict[str, Any]:
    from dtfcli.errors import ConfigError
    from dtfcli.loading.load import load_model
    from dtfcli.models.conversion import to_dense

    if overrides:
        raise ConfigError(f"{overrides[0]}: settings go with a preset; {source} is a model.")
    model: Any = load_model(source, device="cpu", dtype=dtype, revision=revision, trust_remote_code=trust)
    if not hasattr(model, "set_routing"):
        raise ConfigError(f"{source} is a dense model: give a routed one, or a preset.")
    return {"dense": to_dense(model), model.config.architecture: model}


def _show(report: Any) -> None:
    from dtfcli.cli import render

    where = f"{report.device}, {report.dtype}, {report.threads} threads, torch {report.torch}"
    if report.training:
        rows = [
            [
                r.architecture,
                f"{r.capacity:g}",
                f"{r.forward_ms:.0f}",
                f"{r.backward_ms:.0f}",
                f"{r.optimizer_ms:.0f}",
                f"{r.time_ratio:.3f}",
                "" if r.cpu_ratio is None else f"{r.cpu_ratio:.3f}",
                f"{r.flop_ratio:.3f}",
                f"{r.time_ratio / r.flop_ratio:.3f}",
                "" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:.2f}",
                f"{r.tokens_per_second:,.0f}",
                "" if r.utilization is None else f"{r.utilization:.0%}",
            ]
            for r in report.training
        ]
        columns = ["model", "γ", "forward ms", "backward ms", "optimizer ms", "time ratio", "CPU ratio", "FLOP ratio"]
        columns += ["ratio", "peak GiB", "tokens/s", "of peak"]
        title = f"training step, batch {report.batch} of {report.seq_len} tokens; {where}"
        render.out.print(render.table(columns, rows, title=title))
    if report.results:
        rows = [
            [
                r.phase,
                r.architecture,
                f"{r.capacity:g}",
                f"{r.routed_share:.3f}",
                f"{r.dense_ms:.1f}",
                f"{r.routed_ms:.1f}",
                f"{r.time_ratio:.3f}",
                f"{r.theory:.3f}",
                f"{r.time_ratio / r.theory:.3f}",
                f"{r.cache_ratio:.3f}",
                f"{r.tokens_per_second:,.1f}",
            ]
            for r in report.results
        ]
        columns = ["phase", "model", "γ", "routed", "dense ms", "ms", "time ratio", "theory", "ratio", "cache"]
        title = f"batch {report.batch}, prompt {report.seq_len}, then {report.new_tokens} tokens; {where}"
        render.out.print(render.table([*columns, "tokens/s"], rows, title=title))
    render.out.print(
        f"theory: FLOPs (training, prefill), weights read (decode); matmul peak {report.matmul_gflops:,.0f} GFLOP/s"
    )
