"""A stranger's folder may not run code, lead out of itself, or borrow results."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dtfcli.data.documents import open_sources
from dtfcli.errors import CheckpointError, DTFError
from dtfcli.hub.upload import prepare_upload
from dtfcli.loading.build import build_model
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.settings.data import Source
from dtfcli.settings.schema import load_settings
from tests.strangers.damage import write_pickle
from tests.strangers.test_readers import bounded_memory

CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("kind", ["dense", "adapter"])
def test_no_code_of_the_folder_runs(healthy: Path, tmp_path: Path, kind: str) -> None:
    folder, marker = shutil.copytree(healthy / "models" / kind, tmp_path / "it"), tmp_path / "ran"
    code = CODE.format(marker=str(marker))
    (folder / "theirs.py").write_text(f"{code}class Config: pass\nclass Model: pass\n")
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change(folder / "config.json", model_type="theirs", auto_map=classes)
    tokenizers = {"AutoTokenizer": ["theirs.Model", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="Theirs", auto_map=tokenizers)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    readers: list[Callable[[], Any]] = [lambda: load_model(folder, device="cpu")]
    if kind == "dense":
        settings = load_settings(None, [f"model.base={folder}", "model=dense"])
        readers += [lambda: load_tokenizer(folder), lambda: build_model(settings, meta=True)]
    for read in readers:
        with pytest.raises(DTFError, match="--trust-remote-code" if kind == "dense" else None):
            read()
    assert not marker.exists()


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_runs_nothing(healthy: Path, tmp_path: Path, plain: bool) -> None:
    folder, marker = shutil.copytree(healthy / "models/dense", tmp_path / "it"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "pytorch_model.bin", marker, plain)
    with pytest.raises(CheckpointError, match="the model cannot be loaded"):
        load_model(folder, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("place", [None, 4, 8, 16, 24])
def test_a_damaged_gguf_is_explained(healthy: Path, tmp_path: Path, place: int | None) -> None:
    """After the letters GGUF: version, number of tensors, number of values, length of the first name; cut, or huge."""
    data, file = (healthy / "gguf" / "small.gguf").read_bytes(), tmp_path / "damaged.gguf"
    file.write_bytes(data[:23] if place is None else data[:place] + struct.pack("<Q", 2**60) + data[place + 8 :])
    for read in (lambda: load_model(file, device="cpu"), lambda: load_tokenizer(file)):
        with bounded_memory(2**29), pytest.raises(CheckpointError, match=r"damaged\.gguf: .*again\.$"):
            read()


def test_the_hubs_cache_is_made_of_links(healthy: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(healthy / "models/dense", blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
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


def test_results_of_other_weights_are_not_pushed(healthy: Path, tmp_path: Path) -> None:
    run = shutil.copytree(healthy / "small/run", tmp_path / "it")
    assert b"| validation_text | loss |" in bytes(prepare_upload(run, "me/new").files["README.md"])
    weights = run / "final_model" / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"] += 1
    save_file(state, weights, metadata={"format": "pt"})
    assert b"| validation_text | loss |" not in bytes(prepare_upload(run, "me/new").files["README.md"])
