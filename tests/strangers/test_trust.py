"""What a stranger's folder may not do: run code, lead out of itself, borrow results."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtfcli.data.documents import open_sources
from dtfcli.errors import CheckpointError, ConfigError, DTFError
from dtfcli.hub.upload import prepare_upload
from dtfcli.loading.build import build_model
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.settings.data import Source
from dtfcli.settings.schema import load_settings
from dtfcli.training.checkpoint import read_state
from tests.strangers.damage import fresh_copy
from tests.strangers.test_checkpoints import Runs
from tests.strangers.test_readers import bounded_memory

CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def strangers_code(folder: Path, marker: Path) -> None:
    """Code in a folder, and a configuration and a tokenizer that name it."""
    (folder / "theirs.py").write_text(CODE.format(marker=str(marker)) + "class Config: pass\nclass Model: pass\n")
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change(folder / "config.json", model_type="theirs", auto_map=classes)
    change(
        folder / "tokenizer_config.json", tokenizer_class="Theirs", auto_map={"AutoTokenizer": ["theirs.Model", None]}
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))


def test_no_code_of_the_folder_runs(healthy: Path, tmp_path: Path) -> None:
    folder, marker = fresh_copy(healthy / "models/dense", tmp_path / "it"), tmp_path / "ran"
    strangers_code(folder, marker)
    for read in (
        lambda: load_model(folder, device="cpu"),
        lambda: load_tokenizer(folder),
        lambda: build_model(load_settings(None, [f"model.base={folder}", "model=dense"]), meta=True),
    ):
        with pytest.raises(DTFError, match="--trust-remote-code"):
            read()
    assert not marker.exists()


def test_no_code_beside_an_adapter_runs(healthy: Path, tmp_path: Path) -> None:
    folder, marker = fresh_copy(healthy / "models/adapter", tmp_path / "it"), tmp_path / "ran"
    strangers_code(folder, marker)
    with pytest.raises(DTFError):
        load_model(folder, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_runs_nothing(healthy: Path, tmp_path: Path, plain: bool) -> None:
    folder, marker = fresh_copy(healthy / "models/dense", tmp_path / "it"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    if plain:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Runs(marker)}))
    else:
        torch.save({"x": Runs(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="the model cannot be loaded"):
        load_model(folder, device="cpu")
    assert not marker.exists()


DAMAGED_GGUF: dict[str, Callable[[bytes], bytes]] = {
    **{f"cut at {length}": lambda data, length=length: data[:length] for length in (4, 6, 23, 24, 40)},
    **{
        f"{number} at {place}": lambda data, place=place, number=number: (
            data[:place] + struct.pack("<Q", number) + data[place + 8 :]
        )
        for place, number in ((4, 2**60), (8, 2**60), (8, 2**64 - 1), (16, 2**31), (24, 2**60))
    },
}
"""After the letters GGUF: version, number of tensors, number of values, length of the first name."""


@pytest.mark.parametrize("name", DAMAGED_GGUF)
def test_a_damaged_gguf_is_explained(healthy: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(DAMAGED_GGUF[name]((healthy / "gguf" / "small.gguf").read_bytes()))
    for read in (lambda: load_model(file, device="cpu"), lambda: load_tokenizer(file)):
        with bounded_memory(2**29), pytest.raises(CheckpointError, match=r"damaged\.gguf: .*again\.$"):
            read()


def test_a_kernel_on_the_hub_is_not_fetched(healthy: Path, tmp_path: Path) -> None:
    folder = fresh_copy(healthy / "models/dense", tmp_path / "it")
    change(folder / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(CheckpointError, match=r"config\.json: attn_implementation = 'somebody/kernel' names code"):
        load_model(folder, device="cpu")


def test_nothing_outside_is_read(healthy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(healthy / "models/sharded", outside)
    folder = fresh_copy(healthy / "models/sharded", tmp_path / "it")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"../outside/{file}" for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    linked = fresh_copy(healthy / "models/dense", tmp_path / "linked")
    (linked / "tokenizer.json").unlink()
    (linked / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    called = fresh_copy(healthy / "models/routed", tmp_path / "called")
    change(called / "config.json", auto_map={"AutoConfig": "../outside/secret.Config"})
    for read in (lambda path: load_model(path, device="cpu"), lambda path: prepare_upload(path, "me/new")):
        with pytest.raises(CheckpointError, match=r"index\.json: names files outside its folder"):
            read(folder)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: a link out of its folder"):
            read(linked)
    with pytest.raises(CheckpointError, match=r"auto_map in its config\.json names '\.\./outside/secret'"):
        prepare_upload(called, "me/new")


def test_the_hubs_cache_is_made_of_links(healthy: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((healthy / "models/dense").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert load_model(snapshot, device="cpu") is not None
    assert load_tokenizer(snapshot)("a")["input_ids"] == [0]


def test_links_out_of_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("SECRET")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(DTFError, match="1 links out of the folder are not followed"):
        open_sources([Source(path=str(tmp_path / "texts"))])
    (tmp_path / "texts" / "b.txt").write_text("mine")
    (reader,) = open_sources([Source(path=str(tmp_path / "texts"))])
    report = reader.new_report()
    assert [text for _, text in reader.texts(report)] == ["mine"]
    assert report.skipped == {"link out of the folder": 1}


def test_a_checkpoint_vouches_for_its_own_files_alone(healthy: Path, tmp_path: Path) -> None:
    run = fresh_copy(healthy / "run", tmp_path / "it")
    folder = run / "checkpoints" / "step-000003"
    assert read_state(folder).step == 3
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["../../settings.toml"] = "x"
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"settings\.toml lies outside its folder"):
        read_state(folder)


def test_results_of_other_weights_are_not_pushed(healthy: Path, tmp_path: Path) -> None:
    run = fresh_copy(healthy / "run", tmp_path / "it")
    with_results = prepare_upload(run, "me/new")
    assert b"somebody/words" in bytes(with_results.files["README.md"])
    weights = run / "final_model" / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"] += 1
    save_file(state, weights, metadata={"format": "pt"})
    without = prepare_upload(run, "me/new")
    assert b"somebody/words" not in bytes(without.files["README.md"])
    assert any("no results of these weights" in warning for warning in without.warnings)
    with pytest.raises(ConfigError, match="measured other weights"):
        prepare_upload(run, "me/new", eval_results=run / "eval" / "latest.json")
