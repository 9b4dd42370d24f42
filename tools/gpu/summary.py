"""The stages' JSONs as one Markdown page of tables."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.gpu.job import read_json


def summarize(out: Path, stages: Iterable[str]) -> str:
    """Write summary.md from the files of a folder; returns its text."""
    found = {name: read_json(out / f"{name}.json") for name in stages}
    title = "# Rehearsal on a CPU" if any(part.get("rehearsal") for part in found.values()) else "# On a GPU"
    parts = [title, _overview(found)]
    for name, section in SECTIONS.items():
        try:
            parts.append(f"## {name.capitalize()}\n\n{section(found.get(name, {}))}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # a stage that was ended left half of it
            parts.append(f"## {name.capitalize()}\n\nNot complete ({type(error).__name__}: {error}).")
    text = "\n\n".join(part.rstrip() for part in parts) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with four digits, nothing for None."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value).replace("|", "\\|")


def _overview(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, part in found.items():
        outcome = "missing" if not part else "complete" if part.get("complete") else "broken off"
        rows.append([name, outcome, part.get("seconds"), len(part.get("errors", [])), part.get("stopped") or None])
    errors = [f"{name}: `{error.splitlines()[-1]}`" for name, part in found.items() for error in part.get("errors", [])]
    return "\n\n".join([table(["stage", "outcome", "seconds", "errors", "stopped"], rows), *errors])


def _environment(part: dict[str, Any]) -> str:
    facts = table(["what", "value"], [*part["machine"].items(), *part["versions"].items()])
    matmul = table(
        ["m", "k", "n", "µs", "TFLOP/s"], [[row[x] for x in ("m", "k", "n", "us", "tflops")] for row in part["matmul"]]
    )
    copy = f"Copy on the device: {part['copy']['gb_per_second']:.0f} GB/s, read and written."
    latency = table(["latency", "µs"], [[name.removesuffix("_us"), value] for name, value in part["latency"].items()])
    return "\n\n".join([facts, matmul, copy, latency])


def _tests(part: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in part["counts"].items())
    failures = [f"`{failure['test']}`\n\n```\n" + "\n".join(failure["end"]) + "\n```" for failure in part["failures"]]
    return "\n\n".join([f"{counts}; exit status {part['exit_status']}.", *failures])


def _bench(part: dict[str, Any]) -> str:
    training, inference = [], []
    for case in part["cases"]:
        for row in case["report"]["training"]:
            of_flops = row["time_ratio"] / row["flop_ratio"]
            values = [row[x] for x in ("architecture", "capacity", "step_ms", "time_ratio", "flop_ratio")]
            peak = row["peak_bytes"] / 2**30 if row["peak_bytes"] else None
            training.append([case["name"], *values, of_flops, row["utilization"], row["tokens_per_second"], peak])
        for row in case["report"]["results"]:
            of_theory = row["time_ratio"] / row["theory"]
            known = ("architecture", "capacity", "routed_share", "dense_ms", "routed_ms", "time_ratio", "theory")
            inference.append([case["name"], *(row[x] for x in known), of_theory, row["cache_ratio"]])
    names = [
        "case",
        "model",
        "γ",
        "step ms",
        "time ratio",
        "FLOP ratio",
        "time / FLOPs",
        "of the peak",
        "tokens/s",
        "GiB",
    ]
    parts = [table(names, training)]
    names = ["case", "model", "γ", "routed share", "dense ms", "ms", "time ratio", "theory", "time / theory", "cache"]
    parts.append(table(names, inference))
    if part["skipped"]:
        parts.append("Left out: " + "; ".join(f"{case['name']} ({case['why']})" for case in part["skipped"]) + ".")
    return "\n\n".join(parts)


def _profile(part: dict[str, Any]) -> str:
    names = ("wall_ms", "device_ms", "kernels", "launches", "waits", "copies_to_host")
    profiles = part["profiles"]
    rows = [[p["phase"], p["model"], *(p[x] for x in names), _listed(p["waiting_operations"])] for p in profiles]
    header = [
        "phase",
        "model",
        "wall ms",
        "device ms",
        "kernels",
        "launches",
        "waits",
        "copies to host",
        "operations that wait",
    ]
    parts = [
        f"{part['shape']}, training {part['batch']} x {part['seq_len']}, one token at batch 1.",
        table(header, rows),
    ]
    for profile in profiles:
        name = f"{profile['phase']}, {profile['model']}"
        parts.append(f"{name}: the largest, in milliseconds")
        parts.append(table(["name", "count", "ms"], [[row["name"], row["count"], row["ms"]] for row in profile["top"]]))
        if profile["waits_at"]:
            parts.append(f"{name} waits for the device at {_listed(profile['waits_at'])}.")
    return "\n\n".join(parts)


def _listed(counts: dict[str, int]) -> str | None:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or None


def _adapt(part: dict[str, Any]) -> str:
    what = "SmolLM2-135M on novels" if part["packed"] else "Random weights on generated text"
    names = ("parameters", "steps", "tokens", "seconds", "step_seconds", "tokens_per_second", "mfu")
    rows, curve = [], []
    for run in part["runs"]:
        final = run.get("final", {})
        share = final.get("val/routed_share")
        rows.append([run["architecture"], *(run.get(x) for x in names), final.get("val/loss"), share])
        for line in run["curve"]:
            if "val/loss" in line:
                curve.append([run["architecture"], line["tokens"], line["val/loss"], line.get("val/routed_share")])
    header = [
        "model",
        "parameters",
        "updates",
        "tokens",
        "seconds",
        "s / update",
        "tokens/s",
        "MFU",
        "val/loss",
        "routed share",
    ]
    validation = table(["model", "tokens", "val/loss", "routed share"], curve)
    return "\n\n".join([f"{what}.", table(header, rows), validation])


SECTIONS = {"environment": _environment, "tests": _tests, "bench": _bench, "profile": _profile, "adapt": _adapt}
