"""All stages in order, each in a process of its own with its share of the time, then a summary.

python -m tools.gpu [--minutes 8] [--out DIR] [--data DIR]      # on a machine with a GPU
python -m tools.gpu --rehearse                                  # every stage at toy size on the CPU
python -m tools.gpu --pack DIR --novels FOLDER --model FILE     # what has to travel there

A process for each: an illegal memory access or a full device spoils the process it happens in, not the next stage, and
one that hangs can be ended. DIR gets a JSON for each stage and summary.md, written as soon as they are known.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from tools.gpu.job import ERROR_LINES, Job, read_json, run_stage, write_json
from tools.gpu.pack import pack
from tools.gpu.summary import summarize

STAGES = {
    "environment": ("tools.gpu.environment", 0.07),
    "tests": ("tools.gpu.suite", 0.18),
    "bench": ("tools.gpu.bench", 0.40),
    "profile": ("tools.gpu.profiling", 0.10),
    "adapt": ("tools.gpu.adapt", 0.25),
}
"""Stage → its module, whose `run` does the work, and its share of the time; what one leaves, the next has."""

GRACE = 15.0
"""Seconds that a stage may run over its deadline, before it is ended."""

RESERVE = 5.0
"""Seconds kept for the summary."""


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of the results")
    parser.add_argument("--data", type=Path, default=Path("gpu_pack"), help="folder with model.gguf and text.jsonl")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU: does every stage work?")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="put together what has to travel, and stop")
    parser.add_argument("--novels", type=Path, metavar="FOLDER", help="for --pack: folder of train.parquet")
    parser.add_argument("--model", type=Path, metavar="FILE", help="for --pack: SmolLM2-135M, a .gguf file")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pack is not None:
        sys.stdout.write(pack(options.pack, novels=options.novels, model=options.model))
    elif options.stage is not None:
        job = Job(options.stage, options.out, options.data, options.seconds, options.rehearse)
        run_stage(import_module(STAGES[options.stage][0]).run, job)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        failed = run_all(options.out, options.data, options.minutes, options.rehearse)
        raise SystemExit(1 if failed and options.rehearse else 0)


def run_all(out: Path, data: Path, minutes: float, rehearse: bool) -> list[str]:
    """Run the stages and write the summary; returns those with errors."""
    began, share, failed = time.monotonic(), 0.0, []
    for name in STAGES:
        (out / f"{name}.json").unlink(missing_ok=True)  # of an earlier time
    for name, (_, own_share) in STAGES.items():
        share += own_share
        left = began + share * (60 * minutes - RESERVE) - time.monotonic()
        errors = run_process(name, stage_command(name, out, data, left, rehearse), out, left + GRACE)
        seconds = read_json(out / f"{name}.json").get("seconds", 0.0)
        tell(f"{name}: {seconds:.0f} s of {left:.0f} s" + (f", {len(errors)} errors" if errors else ""))
        for error in errors:
            tell(error)
        failed += [name] if errors else []
    text = summarize(out, list(STAGES))
    tell(text)
    return failed


def stage_command(name: str, out: Path, data: Path, seconds: float, rehearse: bool) -> list[str]:
    """The process of a stage."""
    command = [sys.executable, "-m", "tools.gpu", "--stage", name, "--seconds", f"{seconds:.1f}"]
    return [*command, "--out", str(out), "--data", str(data), *(["--rehearse"] if rehearse else [])]


def run_process(name: str, command: list[str], out: Path, timeout: float) -> list[str]:
    """Run a stage's process to its end, or end it; returns the errors that its JSON has then."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0)
        try:
            code = process.wait(max(timeout, 1.0))
            problem = f"ended with exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"was ended after {timeout:.0f} seconds"
        finally:
            _end_group(process)
        output.seek(0)
        said = output.read().decode("utf-8", "replace").splitlines()[-ERROR_LINES:]
    found = read_json(out / f"{name}.json") or {"stage": name, "rehearsal": False, "errors": []}
    if problem:
        found["errors"].append("\n".join([f"the stage's process {problem}", *said]))
        write_json(out / f"{name}.json", found)
    return found["errors"]


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End the process, and the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it and all of its children have ended
    process.wait()


def tell(text: str) -> None:
    """Say how it goes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
