"""The tables of `dtf bench`."""

from typing import TYPE_CHECKING

from dtfcli.cli import render

if TYPE_CHECKING:
    from dtfcli.bench.report import BenchReport


def show(report: "BenchReport") -> None:
    """Print a table of training steps and one of the other phases."""
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    where = f"{report.device}, {report.dtype}, {threads}, torch {report.torch}"
    if report.training:
        rows = [
            [
                r.architecture,
                f"{r.capacity:g}",
                f"{r.forward_ms:.0f} + {r.backward_ms:.0f} + {r.optimizer_ms:.0f}",
                f"{r.time_ratio:.3f}",
                "" if r.cpu_ratio is None else f"{r.cpu_ratio:.3f}",
                f"{r.flop_ratio:.3f}",
                "" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:.2f}",
                f"{r.tokens_per_second:,.0f}",
                "" if r.utilization is None else f"{r.utilization:.0%}",
            ]
            for r in report.training
        ]
        title = f"training step, batch {report.batch} of {report.seq_len} tokens; {where}"
        render.show_table(["model", "γ", "ms", "time", "CPU", "theory", "GiB", "tokens/s", "peak"], rows, title)
        render.out.print("ms: forward + backward + optimizer; GiB: at most; peak: share of the machine's", style="dim")
    if report.results:
        rows = [
            [
                r.phase,
                r.architecture,
                f"{r.capacity:g}",
                f"{r.routed_share:.3f}",
                f"{r.routed_ms:.1f}",
                f"{r.time_ratio:.3f}",
                f"{r.theory:.3f}",
                f"{r.cache_ratio:.3f}",
                f"{r.tokens_per_second:,.1f}",
            ]
            for r in report.results
        ]
        title = f"batch {report.batch}, prompt {report.seq_len}, then {report.new_tokens} tokens; {where}"
        render.show_table(["phase", "model", "γ", "routed", "ms", "time", "theory", "cache", "tokens/s"], rows, title)
    render.out.print(
        "time, CPU, theory and cache: over dense; theory: FLOPs (training, prefill), weights read (decode); "
        f"matmul peak {report.matmul_gflops:,.0f} GFLOP/s",
        style="dim",
    )
