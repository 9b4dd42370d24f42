"""A run that is killed again and again: each attempt is a process forked from one that has everything loaded.

    python -m tests.training.killed_runs FOLDER KILLS SEED

Trains in FOLDER/undisturbed without a disturbance, and in FOLDER/killed-0 with SIGKILLs at random moments within the
time that the undisturbed run took, resuming after each. When that run ends before all kills are spent, another one
takes the rest, and so on. Prints the moments of the kills of each run as JSON.
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
from tests.training.small_runs import resume, small_settings, the_run

TRAINING = {"max_steps": 24, "eval_every": 8, "checkpoint_every": 4, "log_every": 1}


def attempt(folder: Path, kill_after: float | None) -> float | None:
    """Begin the run in a folder, or go on with it; returns the seconds it took, None where it was killed."""
    settings = small_settings(folder, model={"prior_dropout": 0.3}, training=TRAINING)  # random generators matter
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            if list((folder / "outputs").glob("*/small/settings.toml")):
                resume(the_run(folder))
            else:
                train(settings)
            code = 0
        finally:
            os._exit(code)
    ended = 0
    if kill_after is not None:
        while time.monotonic() - began < kill_after and not ended:
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    assert status == 0, "the run failed"
    return time.monotonic() - began


def main(folder: Path, kills: int, seed: int) -> None:
    """Run both, and print what happened."""
    rng = random.Random(seed)
    seconds = attempt(folder / "undisturbed", None)
    assert seconds is not None
    moments: list[list[float]] = []
    while (left := kills - sum(map(len, moments))) > 0:
        run = folder / f"killed-{len(moments)}"
        moments.append([])
        while len(moments[-1]) < left:
            moment = rng.uniform(0.0, seconds)
            if attempt(run, moment) is not None:
                break  # the rest of a run takes less time than the whole
            moments[-1].append(moment)
        else:
            attempt(run, None)
    sys.stdout.write(json.dumps(moments))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
