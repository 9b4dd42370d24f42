"""`dtf bench`: time and memory of routed models next to dense."""

from typing import Annotated, Any

import typer

from dtfcli.cli import options

PHASES = ("prefill", "decode")


def bench(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET|MODEL] [KEY=VALUE]...",
            help="A preset, whose shape is built with random weights, or a trained routed model.",
            autocompletion=options.complete_preset_or_setting,
            show_default=False,
        ),
    ] = None,
    phases: Annotated[str, typer.Option("--phases", help="prefill, decode, or both with a comma.")] = "prefill,decode",
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of the prompt.")] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows.")] = 1,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens decoded after the prompt.")] = 64,
    capacities: Annotated[
        str, typer.Option("--capacities", help="Capacities γ to measure, with commas.")
    ] = "0.5,0.125",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Prefill passes of each model, in turns.")] = 7,
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", min=64, help="Random tokens that thresholds are measured on.")
    ] = 4096,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Measure prefill and decoding of DTF and MoD against their own dense backbone, alternating, in one process.

    Times are medians; ratios are to dense. Next to each time ratio stands what the computation alone would give:
    FLOPs in prefill, weights read in decoding, both at the share of tokens that was really routed.

    \b
    Examples:
      dtf bench quickstart
      dtf bench dtf-qwen2.5-0.5b model.dense_edges=0 --dtype float32 --phases decode
      dtf bench outputs/2026-01-31/quickstart --capacities 0.75,0.5,0.25 --json
    """
    from dtfcli import presets
    from dtfcli.cli import render
    from dtfcli.errors import ConfigError, did_you_mean

    chosen_phases = [name.strip() for name in phases.split(",") if name.strip()]
    for name in chosen_phases or [phases]:
        if name not in PHASES:
            raise ConfigError(f"--phases {name}: choose from {', '.join(PHASES)}.{did_you_mean(name, PHASES)}")
    shares = _capacities(capacities)
    source, overrides = options.split_preset(arguments)
    source = source or "quickstart"

    import torch

    from dtfcli.benchmark import bench as measure
    from dtfcli.devices import compute_dtype, resolve_device

    place = resolve_device(device)
    precision = compute_dtype(dtype, place)
    if source in presets.preset_names():
        from dtfcli.factory import build_comparison
        from dtfcli.settings import load_settings

        models: dict[str, Any] = dict(build_comparison(load_settings(source, overrides), dtype=precision))
    else:
        models = _trained(source, overrides, precision, revision, trust_remote_code)
    for model in models.values():
        model.to(place)
    dense = models.pop("dense")
    render.note(f"calibrating {', '.join(models)} on {calibration_tokens} random tokens")
    generator = torch.Generator().manual_seed(1)
    rows = max(1, calibration_tokens // min(seq_len, calibration_tokens))
    ids = torch.randint(0, dense.config.vocab_size, (rows, min(seq_len, calibration_tokens)), generator=generator)
    from dtfcli.models.routers import CAPACITY_GRID

    grid = [share for share in CAPACITY_GRID if share in shares]
    for model in models.values():
        model.calibrate([{"input_ids": row.unsqueeze(0)} for row in ids], capacities=grid if grid == shares else None)
    report = measure(
        dense,
        models,
        capacities=shares,
        phases=chosen_phases,
        seq_len=seq_len,
        batch=batch,
        new_tokens=new_tokens,
        repeats=repeats,
        on_progress=render.note,
    )
    if json:
        render.emit_json(report)
        return
    _show(report)


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
    from dtfcli.factory import load_model
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
    title = f"batch {report.batch}, prompt {report.seq_len}, then {report.new_tokens} tokens; {where}"
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
    columns = ["phase", "model", "γ", "routed", "dense ms", "ms", "time ratio", "theory", "ratio", "cache", "tokens/s"]
    render.out.print(render.table(columns, rows, title=title))
    render.out.print(f"theory: FLOPs (prefill), weights read (decode); matmul peak {report.matmul_gflops:,.0f} GFLOP/s")
