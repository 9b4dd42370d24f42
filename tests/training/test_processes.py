"""Several processes train the model that one would."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import dtfcli
from dtfcli.errors import ConfigError
from dtfcli.experiment import train
from dtfcli.runs.folder import list_checkpoints, processes_of
from dtfcli.training.checkpoint import read_state
from dtfcli.training.distributed import Processes, check_processes
from dtfcli.training.loop import TrainResult
from dtfcli.training.plan import for_processes, plan_run
from dtfcli.training.validation import batches_for
from tests.conftest import Outcome
from tests.training.small_runs import lines_of, small_settings, the_run
from tests.training.together import STEPS, settings_of, train_in_two


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TrainResult]:
    """The run of one process, for each architecture once."""
    runs: dict[str, TrainResult] = {}

    def result(architecture: str) -> TrainResult:
        if architecture not in runs:
            runs[architecture] = train(settings_of(tmp_path_factory.mktemp(architecture), architecture))
        return runs[architecture]

    return result


@pytest.mark.parametrize(
    ("architecture", "sharding"),
    [
        ("dtf", "ddp"),
        pytest.param("dtf", "fsdp2", marks=pytest.mark.slow),
        pytest.param("mod", "fsdp2", marks=pytest.mark.long),
        pytest.param("dense", "ddp", marks=pytest.mark.long),
        pytest.param("dense", "fsdp2", marks=pytest.mark.long),
        pytest.param("layerdrop", "fsdp2", marks=pytest.mark.long),
    ],
)
def test_two_processes_reach_the_losses_of_one(
    tmp_path: Path, alone: Callable[[str], TrainResult], architecture: str, sharding: str
) -> None:
    models = train_in_two(tmp_path / "two", architecture, sharding)
    one, two = lines_of(alone(architecture).run_dir), lines_of(the_run(tmp_path / "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    compared = 0
    for first, second in zip(one, two, strict=True):
        for name in ("train/loss", "train/prior_loss", "val/loss", "val/loss_topk", "val/unigram", "val/routed_share"):
            assert (name in first) == (name in second)
            if name in first:
                compared += 1
                assert second[name] == pytest.approx(first[name], abs=1e-3), (name, first["step"])
        if "train/grad_norm" in first:
            assert second["train/grad_norm"] == pytest.approx(first["train/grad_norm"], rel=1e-2)
    assert compared >= STEPS + 3
    assert two[-1]["val/loss"] < two[0]["val/loss"] - 0.5

    weights = load_file(the_run(tmp_path / "two") / "final_model" / "model.safetensors")
    reference = load_file(alone(architecture).final_model_path / "model.safetensors")
    assert weights.keys() == reference.keys()
    total = sum(weight.numel() for name, weight in weights.items() if "thresholds" not in name)  # they are buffers
    for note in models.values():
        if sharding == "ddp":
            assert note["sharded"] == []
            assert note["elements"] == total
        else:  # accelerate would fall back to DDP here without a word
            assert all("router" in name for name in note["whole"])
            assert any("self_attn.q_proj" in name for name in note["sharded"])
            assert note["elements"] < 0.6 * total
    # The routers' buffers, which follow averages, are the same in both processes.
    assert len({(tmp_path / "two" / f"tracked-{rank}.json").read_text() for rank in range(2)}) == 1
    model = dtfcli.load_model(the_run(tmp_path / "two"), device="cpu")
    assert architecture == "dense" or model.is_calibrated


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dtf", pytest.param("dense", marks=pytest.mark.long)])
def test_two_processes_share_the_base_of_adapters(
    tmp_path: Path, alone: Callable[[str], TrainResult], architecture: str
) -> None:
    """LoRA under FSDP2: losses, the adapter folder and the merged model are those of one process.

    The DTF routes by a predicted cost, with forecasts that one process has fitted.
    """
    base = {"base": str(alone("dense").final_model_path)}
    if architecture == "dtf":
        base |= {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"}
    groups = {"model": base, "lora": {"enabled": True, "r": 4, "dropout": 0.0, "merge": True}}
    one = train(settings_of(tmp_path / "one", architecture, **groups))
    notes = train_in_two(tmp_path / "two", architecture, "fsdp2", **groups)
    for note in notes.values():
        assert any("q_proj.base_layer" in name for name in note["sharded"])
        assert any("lora_A" in name for name in note["sharded"])
    for first, second in zip(lines_of(one.run_dir), lines_of(the_run(tmp_path / "two")), strict=True):
        for name in first.keys() & {"train/loss", "train/forecast_loss", "val/loss"}:
            assert second[name] == pytest.approx(first[name], abs=1e-3), (name, first["step"])
    for name, file in (("final_model", "adapter_model.safetensors"), ("merged_model", "model.safetensors")):
        reference = load_file(one.run_dir / name / file)
        ours = load_file(the_run(tmp_path / "two") / name / file)
        assert ours.keys() == reference.keys()
        for key, tensor in reference.items():
            if "thresholds" not in key and "cost_offset" not in key:  # averages over micro-batches
                assert (ours[key] - tensor).abs().max() < 5e-3, key
    model = dtfcli.load_model(the_run(tmp_path / "two"), device="cpu")
    assert architecture == "dense" or model.is_calibrated


def command(folder: Path, *arguments: str, launcher: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *launcher.split(), "-m", "dtfcli", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def configured(folder: Path, sharding: str, **training: Any) -> list[str]:
    """A settings file in the folder; the arguments that run it."""
    settings = settings_of(
        folder,
        "dtf",
        sharding,
        run={"output_dir": "outputs"},
        model={"prior_dropout": 0.2},
        training={"max_steps": 6, "checkpoint_every": 3, "eval_every": 6} | training,
    )
    (folder / "small.toml").write_text(settings.to_toml())
    return ["--config", "small.toml"]


def until(process: "subprocess.Popen[str]", folder: Path, step: int) -> None:
    """Wait for a step of the run in a folder."""
    while process.poll() is None:
        metrics = list(folder.rglob("metrics.jsonl"))
        if metrics and f'"step": {step},' in metrics[0].read_text():
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} never came: {process.communicate()[1]}")


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [pytest.param("ddp", marks=pytest.mark.long), "fsdp2"])
def test_one_of_two_processes_is_killed_and_the_run_resumed(tmp_path: Path, sharding: str) -> None:
    """The other ends soon, and the reason is shown. The resumed run equals one of `accelerate launch` bit for bit."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no"
    launcher += " --dynamo_backend=no --main_process_port=0"  # without a GPU: gloo
    whole = command(undisturbed, *configured(undisturbed, sharding), launcher=launcher)
    output, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    assert output.splitlines() == [f"{the_run(undisturbed).relative_to(undisturbed)}/final_model"]

    process = command(killed, *configured(killed, sharding), "--num-processes=2")
    until(process, killed, 4)
    workers = [m for m in family(process)[1:] if "spawn_main" in " ".join(m.cmdline())]
    workers[1].kill()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 30  # as docs/scaling.md says
    assert process.returncode == 1
    assert "process 1 was ended by SIGKILL" in errors
    assert "Traceback" not in errors
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    run = the_run(killed)
    assert not (run / "final_model").exists()
    assert processes_of(run) == 2

    resumed = command(killed, f"--resume={run}")  # in as many processes again
    output, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    assert ", on from step 3" in errors
    assert lines_of(run) == lines_of(the_run(undisturbed))
    ends = [(at / "final_model" / "model.safetensors").read_bytes() for at in (run, the_run(undisturbed))]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_one_signal_saves_in_all_processes(tmp_path: Path) -> None:
    process = command(
        tmp_path / "run",
        *configured(tmp_path / "run", "ddp", max_steps=5000, checkpoint_every=5000),
        "--num-processes=2",
    )
    until(process, tmp_path / "run", 3)
    members = family(process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert output == ""
    (checkpoint,) = list_checkpoints(the_run(tmp_path / "run"))
    assert "Interrupted at step" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert read_state(checkpoint).processes == 2
    assert psutil.wait_procs(members, timeout=20)[1] == []


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_a_step_are_dealt_out_whole(tmp_path: Path, processes: int) -> None:
    plan = plan_run(small_settings(tmp_path, training={"micro_batch_size": 1}), 100)
    assert plan is not None
    rows = np.arange(plan.rows_per_step)
    dealt = [plan.micro_batches(rows, rank, processes) for rank in range(processes)]
    assert np.concatenate(list(itertools.chain(*dealt))).tolist() == rows.tolist()
    assert len({len(parts) for parts in dealt}) == 1


@given(rows=st.integers(1, 14), count=st.integers(1, 4), size=st.integers(1, 5))
def test_evaluation_rows_go_round(rows: int, count: int, size: int) -> None:
    """All get as many batches, none empty or too large; together they have each row once, or each process all."""
    text = np.arange(rows * 2).reshape(rows, 2)
    dealt = [batches_for(text, size, Processes(count, rank)) for rank in range(count)]
    assert len({len(batches) for batches, _ in dealt}) == 1
    assert all(0 < len(batch) <= size for batches, _ in dealt for batch in batches)
    assert len({shared for _, shared in dealt}) == 1
    seen = [np.concatenate(batches)[:, 0].tolist() for batches, _ in dealt]
    everything = text[:, 0].tolist()
    assert list(itertools.chain(*seen)) == everything if dealt[0][1] else all(mine == everything for mine in seen)


def test_the_size_of_a_step_fits_the_number_of_processes(tmp_path: Path) -> None:
    """Where the settings leave it open, it is a micro-batch of each."""
    open_size = small_settings(tmp_path, training={"tokens_per_update": None, "micro_batch_size": 2})
    assert for_processes(open_size, 1) is open_size
    assert for_processes(open_size, 4).tokens_per_update == 4 * 2 * 32
    with pytest.raises(ConfigError, match=r"tokens_per_update = 128.*× processes = 2 × 32 × 3"):
        check_processes(small_settings(tmp_path), 3)


def test_a_launcher_with_another_number_is_refused(
    dtf: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = dtf("train", "quickstart", "--num-processes", "2")
    assert result.code == 2
    assert "--num-processes 2: the launcher started 4" in result.stderr
