"""All there is to find out on a GPU, in a given time: the tests, `dtf bench` and a few steps of `dtf train`.

python -m tools.gpu [--minutes 10] [--out DIR]    # on a machine with a GPU
python -m tools.gpu --rehearse [--out DIR]        # the same kinds of stage at toy sizes on a CPU, in about a minute

The stages run in the order of their worth, each in a process of its own with a limit of seconds. A stage is left out
when less than half of its limit remains. DIR gets results.json and table.md, written again after every stage, so that a
run that is killed leaves all that it measured. Models have random weights; `dtf train` reads Python's standard library.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINES = 25
"""Of a failed process's output: its end says what went wrong."""

SMALL, LARGE = "dtf-qwen2.5-0.5b", "dtf-qwen2.5-7b"
BLOCKS = ("model.routed_part=block", "model.routed_layers=alternate", "model.kv_tokens=all")
STATIC = ("--static", "--triton", *BLOCKS)
COMPILED = "training.compile=true"
TRAIN = (
    *("model.base=", "model.scratch.family=qwen2", "model.scratch.hidden_size=896", "model.scratch.vocab_size=8192"),
    *("model.scratch.intermediate_size=4864", "model.scratch.num_hidden_layers=24"),
    *("model.scratch.num_attention_heads=14", "model.scratch.num_key_value_heads=2"),
    *("model.scratch.max_position_embeddings=1024", "training.max_steps=20", "training.tokens_per_update=32768"),
    *("training.log_every=1", "training.eval_every=20", "training.checkpoint_every=1000", "data.validation_blocks=8"),
    'data.sources=[{path="python-stdlib"}]',
)
TOY_SHAPE = (
    *("model.base=", "model.scratch.family=qwen2", "model.scratch.hidden_size=32", "model.scratch.vocab_size=300"),
    *("model.scratch.intermediate_size=64", "model.scratch.num_hidden_layers=6"),
    *("model.scratch.num_attention_heads=2", "model.scratch.num_key_value_heads=1"),
    *("model.scratch.max_position_embeddings=128", "data.seq_len=64"),
)
TOY_TRAIN = (
    *("training.max_steps=3", "training.micro_batch_size=2", "training.tokens_per_update=256", "training.log_every=1"),
    *("training.calibration_tokens=256", "data.validation_blocks=2"),
    'data.sources=[{path="python-stdlib",ratio=0.02}]',
)


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of its entry in results.json.
        limit: seconds after which it is ended.
        arguments: of Python; a module follows the first, `-m`.
        read: values from the process's output and the scratch folder.
    """

    name: str
    limit: float
    arguments: tuple[str, ...]
    read: Callable[[str, Path], Any]


def stages(scratch: Path) -> list[Stage]:
    """What runs on a GPU, by worth: compiling takes long and comes last."""
    return [
        environment(),
        tests(150, scratch, "tests", "-m", "gpu and not long"),
        bench("0.5B", 60, SMALL, "train", 1024, 8),
        bench("0.5B", 60, SMALL, "prefill,decode", 1024, 1),
        bench("7B", 75, LARGE, "prefill,decode", 1024, 1),
        bench("7B static", 60, LARGE, "decode", 1024, 1, *STATIC),
        bench("0.5B static", 45, SMALL, "decode", 1024, 1, *STATIC),
        bench("0.5B", 45, SMALL, "prefill", 8192, 1),
        bench("7B", 60, LARGE, "prefill", 8192, 1, "--repeats", "3"),
        train("0.5B dtf", 90, scratch, "model=dtf", *TRAIN),
        train("0.5B dense", 75, scratch, "model=dense", *TRAIN),
        bench("7B static, compiled", 100, LARGE, "decode", 1024, 1, *STATIC, COMPILED),
        bench("0.5B static, compiled", 90, SMALL, "decode", 1024, 1, *STATIC, COMPILED),
        bench("0.5B compiled", 120, SMALL, "train", 1024, 8, COMPILED),
        train("0.5B dtf, compiled", 120, scratch, "model=dtf", COMPILED, *TRAIN),
        train("0.5B dense, compiled", 120, scratch, "model=dense", COMPILED, *TRAIN),
        bench("0.5B", 60, SMALL, "decode", 1024, 16),
        bench("7B", 60, LARGE, "decode", 1024, 16),
    ]


def rehearsal(scratch: Path) -> list[Stage]:
    """One stage of each kind at a toy size; nothing is compiled."""
    toy = ("--device", "cpu", "--new-tokens", "4", "--repeats", "2", "--calibration-tokens", "256", *TOY_SHAPE)
    return [
        environment(),
        tests(120, scratch, "tests/runs/test_files.py"),
        bench("toy", 120, SMALL, "train,prefill,decode", 64, 2, *toy),
        bench("toy static", 120, SMALL, "decode", 32, 1, "--static", *BLOCKS, *toy),
        train("toy dtf", 120, scratch, "model=dtf", "run.device=cpu", *TOY_SHAPE, *TOY_TRAIN),
    ]


def environment() -> Stage:
    """Versions and devices."""
    return Stage("environment", 60, ("-m", "dtfcli", "env", "--json"), lambda output, _: json.loads(output))


def tests(limit: float, scratch: Path, *selection: str) -> Stage:
    """Tests; files that cannot be imported, for want of a package, cost the others nothing."""
    options = ("--continue-on-collection-errors", "--tb=short", "-q", "-p", "no:cacheprovider")
    report = f"--junit-xml={scratch / 'tests.xml'}"
    return Stage("tests", limit, ("-m", "pytest", *options, report, *selection), read_tests)


def bench(name: str, limit: float, preset: str, phases: str, length: int, batch: int, *more: str) -> Stage:
    """`dtf bench` of a shape: dense, dtf and mod."""
    sizes = ("--phases", phases, "--seq-len", str(length), "--batch", str(batch), "--dtype", "bfloat16")
    arguments = ("-m", "dtfcli", "bench", preset, *sizes, *more, "--json")
    title = f"bench {name}, {phases}, {batch} × {length}"
    return Stage(title, limit, arguments, lambda output, _: json.loads(output))


def train(name: str, limit: float, scratch: Path, *overrides: str) -> Stage:
    """`dtf train` of a few steps."""
    where = (f"run.output_dir={scratch / 'runs'}", f"data.cache_dir={scratch / 'tokens'}", "run.name=gpu")
    return Stage(f"train {name}", limit, ("-m", "dtfcli", "train", SMALL, *overrides, *where), read_train)


def read_tests(_: str, scratch: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and the ends of what failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = {}
    for case in xml.etree.ElementTree.parse(scratch / "tests.xml").getroot().iter("testcase"):
        problems = [part for part in case if part.tag in ("failure", "error")]
        outcome = "failed" if problems else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] += 1
        for problem in problems:
            failures[f"{case.get('classname')}::{case.get('name')}"] = (problem.text or "").splitlines()[-LINES:]
    return counts | {"failures": failures}


def read_train(output: str, _: Path) -> dict[str, Any]:
    """Speed of the later half of the steps, and the losses."""
    metrics = (Path(output.splitlines()[-1]).parent / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [line for line in map(json.loads, metrics) if "tokens_per_second" in line]
    later = steps[len(steps) // 2 :]
    means = {
        name: sum(line[name] for line in later) / len(later)
        for name in ("tokens_per_second", "mfu")
        if all(line.get(name) is not None for line in later)
    }
    return {"steps": len(steps), **means, "first_loss": steps[0]["train/loss"], "last_loss": steps[-1]["train/loss"]}


def run(stage: Stage, limit: float, scratch: Path) -> dict[str, Any]:
    """Run a stage's process to its end, or end it; an entry of results.json."""
    began = time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    entry: dict[str, Any] = {"name": stage.name, "arguments": stage.arguments}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, *stage.arguments]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=errors, process_group=0, text=True
        )
        try:
            process.wait(limit)
            if process.returncode:
                entry["error"] = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            entry["error"] = f"ended after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGINT)  # pytest then still reports what it ran
        finally:
            _end(process)
        entry["seconds"] = round(time.monotonic() - began, 1)
        for stream in (output, errors):
            stream.seek(0)
        text = output.read()
        if "error" in entry:
            entry["said"] = [*text.splitlines()[-LINES:], *errors.read().splitlines()[-LINES:]]
    try:
        entry["values"] = stage.read(text, scratch)
    except (OSError, ValueError, LookupError, xml.etree.ElementTree.ParseError) as error:
        entry.setdefault("error", f"{type(error).__name__}: {error}")
    return entry


def _end(process: "subprocess.Popen[str]") -> None:
    """Wait a few seconds, then end the process and all that it started."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all have ended
    process.wait()


def run_all(chosen: Iterable[Stage], out: Path, scratch: Path, minutes: float) -> list[dict[str, Any]]:
    """Run the stages that the time allows; write what is known after each."""
    deadline = time.monotonic() + 60 * minutes
    entries: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    for stage in chosen:
        left = deadline - time.monotonic()
        if left < stage.limit / 2:
            entries.append({"name": stage.name, "error": f"left out: {max(left, 0.0):.0f} s remained"})
        else:
            entries.append(run(stage, min(stage.limit, left), scratch))
        _replace(out / "results.json", json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
        _replace(out / "table.md", tables(entries))
        sys.stdout.write(f"{stage.name}: {entries[-1].get('error', 'done')}, {entries[-1].get('seconds', 0.0)} s\n")
        sys.stdout.flush()
    return entries


def _replace(file: Path, text: str) -> None:
    """Write a file as a whole: who is killed leaves the last state, not half a file."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def tables(entries: Sequence[dict[str, Any]]) -> str:
    """Everything as Markdown."""
    overview, steps, phases, training = [], [], [], []
    keys: tuple[str, ...]
    for entry in entries:
        name, values = entry["name"], entry.get("values", {})
        counts = [f"{values[key]} {key}" for key in ("passed", "failed", "skipped") if key in values]
        overview.append([name, entry.get("seconds"), entry.get("error", "complete"), ", ".join(counts)])
        if name.startswith("train "):
            keys = ("steps", "tokens_per_second", "mfu", "first_loss", "last_loss")
            training.append([name, *(values.get(key) for key in keys)])
        for row in values.get("training", []):
            keys = ("architecture", "capacity", "step_ms", "time_ratio", "flop_ratio", "utilization")
            steps.append([name, *(row[key] for key in keys), (row["peak_bytes"] or 0) / 2**30])
        for row in values.get("results", []):
            keys = ("phase", "architecture", "capacity", "routed_share", "dense_ms", "routed_ms", "time_ratio")
            phases.append([name, *(row[key] for key in (*keys, "theory", "cache_ratio"))])
    parts = [
        table(["stage", "seconds", "outcome", "tests"], overview),
        table(["training step", "model", "γ", "ms", "time ratio", "FLOP ratio", "of the peak", "GiB"], steps),
        table(
            ["inference", "phase", "model", "γ", "routed", "dense ms", "ms", "time ratio", "theory", "cache"], phases
        ),
        table(["run", "steps", "tokens/s", "MFU", "first loss", "last loss"], training),
    ]
    return "\n\n".join(parts) + "\n"


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


def main() -> None:
    """Run what the arguments ask for; exit 1 when a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU: does every kind of stage work?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = (rehearsal if options.rehearse else stages)(Path(folder))
        entries = run_all(chosen, options.out.resolve(), Path(folder), options.minutes)
    sys.exit(int(any("error" in entry for entry in entries)))


if __name__ == "__main__":
    main()
