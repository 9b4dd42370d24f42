"""The line that `--stats` shows."""

from typing import Any

from dtfcli.cli.render import note


def show_stats(result: Any) -> None:
    """One line on stderr: speed, cache and routed share of a continuation."""
    stats = result.stats
    parts = [f"prefill {stats.prefill_tokens_per_second:,.0f} tokens/s"]
    if stats.decode_tokens_per_second is not None:
        parts.append(f"decode {stats.decode_tokens_per_second:,.1f} tokens/s")
    if stats.cache_bytes is not None:
        share = stats.cache_bytes / stats.dense_cache_bytes
        of_dense = f", {share:.2f} of the dense model's" if share != 1.0 else ""
        parts.append(f"cache {stats.cache_bytes / 2**20:.2f} MiB{of_dense}")
    if stats.routed_share is not None:
        parts.append(f"routed share {stats.routed_share:.2f}")
    if stats.saved_share is not None:
        parts.append(f"{stats.saved_share:.0%} of the FLOPs saved")
    note(" · ".join(parts))
