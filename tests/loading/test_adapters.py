"""LoRA: train → load → generate → evaluate → push, with a base that nobody writes to."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dtfcli
from dtfcli.errors import CheckpointError
from dtfcli.experiment import train
from dtfcli.hub.upload import prepare_upload
from dtfcli.loading.adapters import adapt, adapter_state, is_adapted, merge
from dtfcli.loading.model_files import weights_hash
from dtfcli.models.pretrained import is_added
from dtfcli.runs.folder import run_settings
from dtfcli.training.events import TrainEvent
from dtfcli.training.loop import TrainResult
from tests.conftest import Outcome
from tests.tiny import tokens
from tests.training.small_runs import Killed, kill_at, lines_of, small_settings, the_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

LORA = {"enabled": True, "r": 4}


def adapted_settings(folder: Path, base: Path, architecture: str = "dtf", **groups: dict[str, Any]) -> Any:
    groups = {"lora": LORA, **groups}
    groups["model"] = {"base": str(base), **groups.get("model", {})}
    return small_settings(folder, architecture, **groups)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that a run has left; do not change it."""
    return train(small_settings(tmp_path_factory.mktemp("base"), "dense")).final_model_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, TrainResult]:
    """A LoRA run of each architecture; do not change them."""
    results = {}
    for architecture in ("dtf", "mod", "dense"):
        folder = tmp_path_factory.mktemp(architecture)
        lora = LORA | {"merge": architecture == "dtf"}
        results[architecture] = train(adapted_settings(folder, base, architecture, lora=lora))
    return results


def ids() -> torch.Tensor:
    return tokens(3, 30) % 90


def test_the_base_is_left_bit_for_bit(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory after the last update, and on disk."""
    from dtfcli.training import loop

    seen: dict[str, Any] = {}
    monkeypatch.setattr(loop, "finish", lambda run, finish=loop.finish: (seen.update(model=run.model), finish(run))[1])
    on_disk = weights_hash(base)
    events: list[TrainEvent] = []
    train(adapted_settings(tmp_path, base), on_event=events.append)
    assert weights_hash(base) == on_disk
    (start,) = [event for event in events if event.kind == "start"]
    assert start.metrics["trainable"] == sum(p.numel() for p in seen["model"].parameters() if p.requires_grad)
    stored = load_file(base / "model.safetensors")

    state = seen["model"].state_dict()
    backbone = {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}
    assert all(torch.equal(backbone[name], tensor) for name, tensor in stored.items())
    trained = [tensor for name, tensor in state.items() if "lora_B" in name]
    assert trained
    assert all(tensor.abs().max() > 0 for tensor in trained)


@pytest.mark.parametrize("architecture", ["dtf", "mod", "dense"])
def test_what_is_trained(base: Path, tmp_path: Path, architecture: str) -> None:
    from dtfcli.loading.build import build_model

    settings = adapted_settings(tmp_path, base, architecture)
    model = adapt(build_model(settings), settings)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name or is_added(name)}
    adapted = {name.rpartition(".lora_A")[0] for name in trained if ".lora_A" in name}
    assert len(adapted) == 4 * 7
    assert not [name for name in adapted if is_added(name)]


@pytest.mark.parametrize("architecture", ["dtf", "mod", "dense"])
def test_a_run_is_loaded_with_everything_it_trained(runs: dict[str, TrainResult], architecture: str) -> None:
    """Configuration, routers, priors and thresholds bit for bit; logits as those of the adapted model to 1e-5."""
    folder = runs[architecture].final_model_path
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (folder / "model.safetensors").exists()
    model = dtfcli.load_model(runs[architecture].run_dir)
    stored = load_file(folder / "adapter_model.safetensors")
    added = {name: tensor for name, tensor in model.state_dict().items() if is_added(name)}
    assert bool(added) == (architecture != "dense")
    for name, tensor in added.items():
        assert torch.equal(tensor, stored["base_model.model." + name]), name
    written = json.loads((folder / "config.json").read_text())
    ours = json.loads(model.config.to_json_string())
    for name in set(written) | set(ours):
        if name not in ("transformers_version", "_name_or_path", "auto_map", "architectures", "dtype"):
            assert written.get(name) == ours.get(name), name
    assert not is_adapted(model)
    assert torch.isfinite(model(ids()).logits).all()


def test_merged_is_adapted(base: Path, tmp_path: Path) -> None:
    from dtfcli.loading.build import build_model

    settings = adapted_settings(tmp_path, base)
    model: Any = adapt(build_model(settings), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.calibrate([{"input_ids": tokens(16, 32, seed=1)}])
    model.eval()
    plain = merge(copy.deepcopy(model))
    assert is_adapted(model)
    assert not is_adapted(plain)
    with torch.no_grad():
        for mode in ("threshold", "topk"):
            with model.routing_mode(mode), plain.routing_mode(mode):
                assert torch.allclose(model(ids()).logits, plain(ids()).logits, atol=1e-5)


def test_lower_precision_keeps_the_routers(runs: dict[str, TrainResult]) -> None:
    model = dtfcli.load_model(runs["dtf"].run_dir, dtype="bfloat16")
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[1].router.thresholds.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, base: Path) -> None:
    """Dropout in the adapters, distillation, annealing: all of it goes on where it was."""
    groups: dict[str, Any] = {
        "lora": LORA | {"dropout": 0.3},
        "distill": {"enabled": True},
        "training": {"capacity_schedule": "cosine", "capacity_fraction": 0.9},
    }
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = train(adapted_settings(tmp_path / "whole", base, **groups))
    with pytest.raises(Killed):
        train(adapted_settings(tmp_path / "killed", base, **groups), on_event=kill_at("step", 3))
    killed = the_run(tmp_path / "killed")
    resumed = train(run_settings(killed), resume=killed)
    for name in ("final_model", "best_model"):
        first, second = (load_file(run / name / "adapter_model.safetensors") for run in (whole.run_dir, killed))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert lines_of(resumed.run_dir) == lines_of(whole.run_dir)


def test_commands(runs: dict[str, TrainResult], dtf: Callable[..., Outcome], tmp_path: Path) -> None:
    run = str(runs["dtf"].run_dir)
    written = dtf("generate", run, "the cat", "--max-new-tokens", "6")
    assert written.code == 0, written
    assert written.stdout == dtf("generate", f"{run}/merged_model", "the cat", "--max-new-tokens", "6").stdout
    plain = {path.name for path in (runs["dtf"].run_dir / "merged_model").iterdir()}
    assert "modeling_dynamic.py" in plain - {"adapter_config.json"} == plain
    assert not (runs["mod"].run_dir / "merged_model").exists()
    scored = dtf("eval", run, "--tasks", "validation_text")
    assert scored.code == 0, scored
    document = json.loads((runs["dtf"].run_dir / "eval" / "latest.json").read_text())
    assert document["architecture"] == "dtf"
    assert document["results"]["validation_text"]["n"] > 0
    merged = tmp_path / "merged"
    pushed = dtf("push", run, "me/new", "--merge", "--dry-run", str(merged))
    assert pushed.code == 0, pushed
    assert "validation_text" in (merged / "README.md").read_text()  # the adapter's own evaluation
    for folder in (merged, f"{run}/merged_model"):
        assert torch.allclose(dtfcli.load_model(folder)(ids()).logits, dtfcli.load_model(run)(ids()).logits, atol=1e-5)


def test_a_dry_run_counts_the_trainable_parameters(
    runs: dict[str, TrainResult], base: Path, tmp_path: Path, dtf: Callable[..., Outcome]
) -> None:
    state = load_file(runs["dtf"].final_model_path / "adapter_model.safetensors")
    trained = sum(tensor.numel() for name, tensor in state.items() if "thresholds" not in name)
    file = tmp_path / "my.toml"
    file.write_text(adapted_settings(tmp_path, base).to_toml())
    result = dtf("train", "--config", str(file), "--dry-run", "--json")
    assert json.loads(result.stdout)["account"]["trainable_parameters"] == trained


@pytest.fixture
def adapter(runs: dict[str, TrainResult], tmp_path: Path) -> Path:
    """An adapter folder of one's own."""
    return Path(shutil.copytree(runs["dtf"].final_model_path, tmp_path / "adapter"))


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            "adapter_config.json: cannot be read as JSON .* save the adapter again",
        ),
        (lambda folder: drop(folder, "router"), "Weights are missing: .*router"),
        (lambda folder: drop(folder, "lora_A"), "Weights are missing: .*lora_A"),
        (lambda folder: drop(folder, "thresholds"), "Weights are missing: .*thresholds"),
        (lambda folder: change(folder / "config.json", routed_layers=[3]), "Weights are not known to the base"),
    ],
)
def test_nothing_is_drawn_afresh(adapter: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(adapter)
    with pytest.raises(CheckpointError, match=message) as error:
        dtfcli.load_model(adapter)
    assert str(adapter) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def drop(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(name for name in sorted(tensors) if part in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)


def test_an_adapter_goes_on_from_an_adapter(adapter: Path, tmp_path: Path) -> None:
    """Its base is then the adapter, merged; routed as it was."""
    result = train(adapted_settings(tmp_path, adapter))
    assert torch.isfinite(dtfcli.load_model(result.run_dir)(ids()).logits).all()


def test_an_adapter_of_a_local_base_is_not_pushed_alone(adapter: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"which exists only here.* --merge") as error:
        prepare_upload(adapter, "me/new")
    assert str(base) not in str(error.value)


@pytest.mark.parametrize("architecture", ["dtf", "dense"])
def test_an_adapter_of_a_hub_model_is_pushed_with_its_base_named(
    runs: dict[str, TrainResult], tmp_path: Path, architecture: str
) -> None:
    adapter = Path(shutil.copytree(runs[architecture].final_model_path, tmp_path / "adapter"))
    change(adapter / "adapter_config.json", base_model_name_or_path="HuggingFaceTB/SmolLM2-135M")
    upload = prepare_upload(adapter, "me/new")
    assert set(upload.files) >= {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"}
    assert not [name for name in upload.files if name.endswith(".py")]
    card = upload.files["README.md"].decode()
    assert "base_model: HuggingFaceTB/SmolLM2-135M" in card
    assert "base_model_relation: adapter" in card
    assert "library_name: peft" in card
    assert ("dtfcli.load_model(" in card) == (architecture == "dtf")
    everything = b"".join(item for item in upload.files.values() if isinstance(item, bytes))
    assert not re.search(rb"/(tmp|home|root)/", everything)


def test_an_adapter_on_the_hub_is_loaded(
    runs: dict[str, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, where a download would have put it."""
    from huggingface_hub import constants

    commit = "c" * 40
    repo = tmp_path / "cache" / "models--me--adapter"
    shutil.copytree(runs["dtf"].final_model_path, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    model = dtfcli.load_model("me/adapter")
    assert torch.equal(model(ids()).logits, dtfcli.load_model(runs["dtf"].run_dir)(ids()).logits)


def test_state_names_are_pefts(runs: dict[str, TrainResult], base: Path) -> None:
    """`PeftModel.from_pretrained` on a routed base finds adapters, routers, priors and thresholds."""
    from peft import PeftModel

    dense = dtfcli.load_model(base)
    torch.manual_seed(5)
    routed = dtfcli.convert(dense, "dtf", 0.5)
    wrapped = PeftModel.from_pretrained(routed, str(runs["dtf"].final_model_path)).eval()
    ours = dtfcli.load_model(runs["dtf"].run_dir)
    assert torch.allclose(wrapped(input_ids=ids()).logits, ours(ids()).logits, atol=1e-5)
    stored = load_file(runs["dtf"].final_model_path / "adapter_model.safetensors")
    assert stored.keys() == adapter_state(wrapped.get_base_model()).keys()
