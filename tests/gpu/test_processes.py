"""DDP and FSDP2 over NCCL, with the one process that a single GPU allows; in a rehearsal over gloo."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dtfcli.settings.training import TrainingSettings
from dtfcli.training.distributed import Processes, Replicated, Sharded, connect
from dtfcli.training.objectives import Objective
from dtfcli.training.optim import GROUPS, build_optimizer
from tests.gpu.cases import build
from tests.tiny import tokens
from tests.training.small_runs import small_settings

pytestmark = pytest.mark.gpu


@pytest.fixture
def connected(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The group of one process, as a launcher would have started it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in (here | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")  # accelerate would not for one process
    yield
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def states_of(kind: type[Replicated], folder: Path, device: torch.device, dtype: str, case: str) -> Replicated:
    """The model of a case, placed as a run would place it."""
    accelerator, processes = connect(small_settings(folder, run={"device": device.type, "dtype": dtype}))
    assert processes == Processes(1, 0, accelerator.device)
    assert accelerator.device.type == device.type
    objective = Objective(build(case, explore=0.0))

    states = kind(accelerator, processes)
    states.prepare(objective, lambda: optimizer_of(objective))
    return states


def optimizer_of(objective: Objective) -> torch.optim.AdamW:
    """As a run has it: groups by learning rate, routers in one of their own."""
    training = {"learning_rates": dict.fromkeys(GROUPS, 1e-2), "weight_decay": 0.0}
    return build_optimizer(objective.model, TrainingSettings.model_validate(training))


def step(states: Replicated, ids: torch.Tensor) -> float:
    """An update in two micro-batches; returns its loss."""
    states.objective.train()
    states.optimizer.zero_grad()
    total = 0.0
    with states.converting_once():
        for place, rows in enumerate(ids.split(2), 1):
            with states.accumulating(is_last=place == 2):
                loss = states.trained(rows, ids[:, 1:].numel()).loss
                states.backward(loss)
            total += loss.item()
    states.reduce_gradients()
    for group in states.optimizer.param_groups:
        states.clip(group["params"], 1.0)
    states.optimizer.step()
    return total


@pytest.mark.parametrize(("case", "dtype"), [("surprise", "float32"), ("forecast error", "bfloat16")])
@pytest.mark.parametrize("kind", [Replicated, Sharded])
def test_one_process_trains_the_model_that_none_would(
    kind: type[Replicated], dtype: str, case: str, connected: None, device: torch.device, tmp_path: Path
) -> None:
    """Three updates; then a checkpoint of the second is loaded again, and the third repeats itself."""
    states = states_of(kind, tmp_path, device, dtype, case)
    ids = tokens(4, 32, 2).to(device)
    assert dist.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
    if kind is Sharded:
        sharded = [name for name, p in states.objective.model.named_parameters() if isinstance(p, DTensor)]
        assert any("self_attn.q_proj" in name for name in sharded)
    else:
        assert isinstance(states.trained, DistributedDataParallel)
    found = [step(states, ids), step(states, ids)]
    states.save(tmp_path / "saved")
    found.append(step(states, ids))
    states.load(tmp_path / "saved")
    assert step(states, ids) == pytest.approx(found[2], abs=1e-4 if dtype == "float32" else 0.02)

    plain = Objective(build(case, explore=0.0)).to(device).train()
    optimizer = optimizer_of(plain)
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            both = [plain(rows, ids[:, 1:].numel()).loss for rows in ids.split(2)]
        for loss in both:
            loss.backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        expected.append(sum(loss.item() for loss in both))
    assert found == pytest.approx(expected, rel=1e-3 if dtype == "float32" else 0.05)


def test_whole_weights_are_those_that_were_sharded(connected: None, device: torch.device, tmp_path: Path) -> None:
    states = states_of(Sharded, tmp_path, device, "bfloat16", "surprise")
    expected = build("surprise", explore=0.0).state_dict()
    found = states.whole_weights()
    assert found is not None
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.cpu().nan_to_num(), expected[name].nan_to_num()), name  # no thresholds of other γ yet
    with states.accelerator.autocast(), states.outside():  # as a run calibrates
        states.objective.model.calibrate([{"input_ids": tokens(8, 40)}], capacities=())
