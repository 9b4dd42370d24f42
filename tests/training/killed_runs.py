"""A run that is killed again and again: each attempt is a process forked from one that has everything loaded.

    python -m tests.training.killed_runs FOLDER KILLS SEED

Trains in FOLDER/undisturbed without a disturbance, and in FOLDER/killed-0 with SIGKILLs at random moments between the
start of an attempt and the time that the undisturbed run took, resuming after each. When that run ends before all
kills are spent, another one takes the rest, and so on. Prints a JSON document.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from dtfcli.experiment import train
from dtfcli.runs.folder import run_settings
from tests.training.small_runs import small_settings

UPDATES = 40


def attempt(folder: Path, kill_after: float | None) -> float | None:
    """Begin the run in a folder, or go on with it; returns the seconds it took, None where it was killed."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            runs = list((folder / "outputs").glob("*/small/settings.toml"))
            if runs:
                train(run_settings(runs[0].parent), resume=runs[0].parent)
            else:
                train(
                    small_settings(
                        folder,
                        model={"prior_dropout": 0.3},  # so that the random generators matter
                        training={"max_steps": UPDATES, "eval_every": 8, "checkpoint_every": 4, "log_every": 1},
                    )
                )
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        while time.monotonic() - began < kill_after and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        if time.monotonic() - began < kill_after:
            return time.monotonic() - began  # it had ended by itself
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    assert status == 0, "the run failed"
    return time.monotonic() - began


def main(folder: Path, kills: int, seed: int) -> None:
    """Run both, and print what happened."""
    rng = random.Random(seed)
    seconds = attempt(_new(folder / "undisturbed"), None)
    assert seconds is not None
    moments: list[list[float]] = []
    while (left := kills - sum(map(len, moments))) > 0:
        run = _new(folder / f"killed-{len(moments)}")
        moments.append([])
        while len(moments[-1]) < left:
            moment = rng.uniform(0.0, seconds)
            if attempt(run, moment) is not None:
                break  # what is left of a run takes less time than the whole
            moments[-1].append(moment)
        else:
            attempt(run, None)
    sys.stdout.write(json.dumps({"seconds": seconds, "kills": moments}))


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    small_settings(folder)  # writes the text
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
