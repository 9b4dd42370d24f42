"""Runs in two processes of this machine, for tests: gloo, one thread each."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

from tests.training.small_runs import small_settings

STEPS = 20


def settings_of(folder: Path, architecture: str, sharding: str = "ddp", **groups: dict[str, Any]) -> Any:
    """A run of 20 steps of 4 rows, 1 row at a time; 5 held-out rows, which do not divide by two."""
    training = {"max_steps": STEPS, "micro_batch_size": 1, "log_every": 1, "eval_every": 10, "checkpoint_every": 10}
    values: dict[str, dict[str, Any]] = {
        "training": training | groups.pop("training", {}) | {"sharding": sharding},
        "data": {"validation_blocks": 5},
    }
    return small_settings(folder, architecture, **values | groups)


def train_in_two(folder: Path, architecture: str, sharding: str, **groups: dict[str, Any]) -> dict[int, Any]:
    """Train in two processes; returns what each noted about its model before the first step.

    Args:
        folder, architecture, sharding, groups: of `settings_of`.

    Returns:
        rank → {"sharded": names of parameters that are DTensors, "whole": the others, "elements": numbers held}.
    """
    from torch.multiprocessing import start_processes

    import tests.faults  # noqa: F401  # processes are forked from one that has everything loaded

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings_of(folder, architecture, **groups)  # writes the text, which two processes must not do at a time
    start_processes(_train, (str(folder), architecture, sharding, port, groups), nprocs=2, start_method="forkserver")
    return {rank: json.loads((folder / f"model-{rank}.json").read_text()) for rank in range(2)}


def _train(
    rank: int, folder: str, architecture: str, sharding: str, port: int, groups: dict[str, dict[str, Any]]
) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1", HF_HUB_OFFLINE="1")
    signal.alarm(240)  # a hang is a failure, not a wait

    import torch
    from torch.distributed.tensor import DTensor

    from dtfcli import experiment
    from dtfcli.training import loop

    torch.set_num_threads(1)
    fit = loop.fit

    def noting(run: Any) -> None:
        named = list(run.model.named_parameters())
        sharded = [name for name, p in named if isinstance(p, DTensor)]
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for _, p in named)
        note = {"sharded": sharded, "whole": [n for n, _ in named if n not in sharded], "elements": held}
        Path(folder, f"model-{rank}.json").write_text(json.dumps(note))
        fit(run)
        tracked = {name: buffer.tolist() for name, buffer in run.model.named_buffers() if "router" in name}
        Path(folder, f"tracked-{rank}.json").write_text(json.dumps(tracked))

    loop.fit = noting
    experiment.train(settings_of(Path(folder), architecture, sharding, **groups))
