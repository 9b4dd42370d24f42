"""What a push would publish: complete enough to open anywhere, and nothing that belongs to this machine."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dtfcli.errors import CheckpointError
from dtfcli.experiment import train
from dtfcli.hub.leaks import find_leaks
from dtfcli.hub.upload import is_replaced_by_a_push, prepare_upload
from dtfcli.runs.public import without_local_traces
from tests.conftest import Outcome
from tests.training.small_runs import small_settings

SECRET = "hf_" + "AbCdEfGhIj" * 3

READER = """
import sys, json
sys.modules["dtfcli"] = None  # importing it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("the cat", return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
print(json.dumps(tokenizer.decode(ids, skip_special_tokens=True)))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on local text, with checkpoints and all; do not change it."""
    return train(small_settings(tmp_path_factory.mktemp("run"))).run_dir


@pytest.mark.slow
def test_a_run_opens_where_dtfcli_is_not_installed(run: Path, tmp_path: Path, dtf: Callable[..., Outcome]) -> None:
    folder = tmp_path / "preview"
    assert dtf("push", str(run), "me/new", "--dry-run", str(folder)).code == 0
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    reader = subprocess.run(
        [sys.executable, "-c", READER, str(folder)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert reader.returncode == 0, reader.stderr[-3000:]
    ours = dtf("generate", str(run), "the cat", "--max-new-tokens", "12")
    assert json.loads(reader.stdout.splitlines()[-1]) == ours.stdout.removesuffix("\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dtf", "mod", "dense"])
def test_the_cards_own_code_runs(saved: dict[str, Path], name: str, tmp_path: Path) -> None:
    upload = prepare_upload(saved[name], "me/new")
    upload.write(tmp_path / "preview")
    card = (tmp_path / "preview" / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    script = 'import sys\nsys.modules["dtfcli"] = None\n' + code.group(1).replace("me/new", str(tmp_path / "preview"))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, input=""
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split()) > 40
    assert "Do you wish to run" not in result.stdout


def test_nothing_of_this_machine_is_uploaded(run: Path, tmp_path: Path) -> None:
    """A scan of its own, independent of the one that a push makes."""
    upload = prepare_upload(run, "me/new")
    upload.write(tmp_path / "preview")
    names = {path.name for path in (tmp_path / "preview").rglob("*")}
    assert names == set(upload.files)
    assert not [name for name in names if re.search(r"\.(pt|pth|bin|pkl|ckpt|jsonl)$|state|optimizer|settings", name)]
    for path in (tmp_path / "preview").iterdir():
        content = path.read_bytes()
        for word in (str(run), str(run.parents[2]), str(Path.home()), str(Path.cwd()), "text.jsonl"):
            assert word.encode() not in content, f"{word} in {path.name}"
        assert not re.search(rb"hf_[A-Za-z0-9]{20,}|/(tmp|home|root|Users)/\w", content), path.name
        assert not content.startswith((b"\x80", b"PK"))
        with pytest.raises((pickle.UnpicklingError, ValueError, IndexError, KeyError, EOFError, AttributeError)):
            pickle.loads(content)


def test_checkpoints_are_no_models(run: Path) -> None:
    with pytest.raises(CheckpointError, match="a training checkpoint"):
        prepare_upload(next((run / "checkpoints").iterdir()), "me/new")


def test_other_files_stay_here_and_are_named(model: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "notes.txt", "secret.py", ".env"):
        (model / name).write_text(SECRET)
    upload = prepare_upload(model, "me/new")
    assert upload.left_out == [".env", "notes.txt", "optimizer.pt", "secret.py", "training_args.bin"]
    assert not set(upload.left_out) & set(upload.files)


def _change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_local_traces_are_cleaned_and_the_rest_kept(model: Path, tmp_path: Path) -> None:
    _change(model / "config.json", _name_or_path="/home/jane/base", custom="/data/jane/x", initializer_range=0.02)
    _change(model / "tokenizer_config.json", name_or_path="/home/jane/tok", tokenizer_file=str(tmp_path / "t.json"))
    _change(model / "generation_config.json", cache_dir="~/.cache", max_length=7)
    upload = prepare_upload(model, "me/new")
    documents = {name: json.loads(upload.files[f"{name}.json"]) for name in ("config", "generation_config")}
    assert documents["config"]["initializer_range"] == 0.02
    assert documents["generation_config"]["max_length"] == 7
    everything = b"".join(item for item in upload.files.values() if isinstance(item, bytes))
    assert b"jane" not in everything
    assert str(tmp_path).encode() not in everything
    assert b".cache" not in everything


def test_what_is_not_a_trace_is_left_as_it_is() -> None:
    document = {
        "eos_token": "</s>",
        "sep": "/",
        "pad_token": "/no_think",
        "auto_map": {"AutoConfig": "configuration_dynamic.DynamicLlamaConfig"},
        "added_tokens_decoder": {"3": {"content": "/a/b"}},
        "names": ["a/b", "owner/name"],
        "rope": {"theta": 1e4, "kind": None},
    }
    assert without_local_traces(document) == document


@pytest.mark.parametrize(
    ("name", "content", "leak"),
    [
        ("config.json", f'{{"a": "{SECRET}"}}', "a Hugging Face token"),
        ("README.md", "export WANDB_API_KEY=" + "0123456789" * 4, "a Weights & Biases key"),
        ("README.md", "ghp_" + "a1" * 18, "a GitHub token"),
        ("README.md", "see AKIAABCDEFGHIJKLMNOP", "an AWS key"),
        ("modeling.py", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("modeling.py", 'open("/home/jane/data.txt")', "the path /home/jane"),
        ("README.md", "from /mnt/nfs/models/base", "the path /mnt/nfs"),
        ("README.md", r"from C:\Users\jane", "the path"),
        ("README.md", "from ~/models", "the path"),
        ("README.md", "file:///x", "the path"),
        ("README.md", f"in {Path.home()}/x", "the path"),
        ("tokenizer.json", json.dumps({"truncation": {"from": "/home/jane/x"}, "model": {}}), "the path /home/jane"),
        ("tokenizer.json", json.dumps({"model": {"vocab": {SECRET: 1}}}), "a Hugging Face token"),
        ("config.json", pickle.dumps({"a": 1}), "a pickle or an archive"),
        ("tokenizer.model", b"PK\x03\x04....", "a pickle or an archive"),
        ("curves.png", b"no picture", "not a .png file"),
        ("curves.png", b"\x89PNG\r\n\x1a\n...Software\x00/home/jane/x", "the path /home/jane"),
        ("model.safetensors", pickle.dumps({"a": 1}), "not a safetensors file"),
        ("model.safetensors", b"", "not a safetensors file"),
        ("model.safetensors", (64).to_bytes(8, "little") + b"\x00" * 64, "not a safetensors file"),
        ("config.json", b"\xff\xfe", "bytes that are not text"),
    ],
)
def test_leaks_are_found(name: str, content: str | bytes, leak: str, tmp_path: Path) -> None:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / "file").write_bytes(data)
    for given in (data, tmp_path / "file"):
        assert any(leak in found for found in find_leaks(name, given)), find_leaks(name, given)


def test_a_secret_of_this_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "qwertzuiopasdfgh")
    assert find_leaks("README.md", b"it is qwertzuiopasdfgh") == ["the value of SOME_API_KEY"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "https://huggingface.co/data/x and owner/tmp/name, 1/2, and/or, ~5 tokens, N/A, sk-learn"),
        ("README.md", "see tasks/home/x.py; src/data/x"),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"/home/jane/x": 1}}, "truncation": None})),
        ("merges.txt", "/home / jane"),
        ("model.py", "x = hf_hub_download  # hf_transfer\nreturn a / tmp / b"),
    ],
)
def test_no_false_alarm(name: str, content: str) -> None:
    assert find_leaks(name, content.encode()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [("modeling_dynamic.py", f"TOKEN = '{SECRET}'"), ("chat_template.jinja", "{# /home/jane/x #}")],
)
def test_a_leak_that_cannot_be_cleaned_stops_the_push(model: Path, name: str, text: str) -> None:
    path = model / name
    path.write_text((path.read_text() if path.exists() else "") + f"\n{text}\n")
    with pytest.raises(CheckpointError, match=re.escape(name) + ".*must not be published") as caught:
        prepare_upload(model, "me/new")
    assert SECRET not in str(caught.value)


def test_the_header_of_the_weights_is_read(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "model.safetensors", {"format": "pt", "source": "/home/jane/run"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: holds the path /home/jane"):
        prepare_upload(model, "me/new")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "routing.py").unlink(), "its code needs routing.py, which is missing"),
        (lambda folder: (folder / "modeling_dynamic.py").unlink(), "its code needs modeling_dynamic.py"),
        (lambda folder: _change(folder / "config.json", auto_map=None), "names no code"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "not a safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "only pytorch_model.bin, a pickle, which is never uploaded",
        ),
        (
            lambda folder: (
                (folder / "model.safetensors").rename(folder / "model-1.safetensors"),
                (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            ),
            "names files outside its folder",
        ),
    ],
)
def test_an_incomplete_model_is_refused(model: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(model)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        prepare_upload(model, "me/new")


def test_a_model_without_a_tokenizer_is_warned_about(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in prepare_upload(model, "me/new").warnings[0]


def test_a_dry_run_that_fails_leaves_no_folder(model: Path, tmp_path: Path, dtf: Callable[..., Outcome]) -> None:
    shutil.rmtree(model)
    result = dtf("push", str(model), "me/new", "--dry-run", str(tmp_path / "preview"))
    assert result.code == 2
    assert not (tmp_path / "preview").exists()


def test_pixels_are_not_searched() -> None:
    """Compressed pixels look like a path now and then; the text of a picture is searched all the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + bytes(4)

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13))
    assert find_leaks("curves.png", start + chunk(b"IDAT", b"x ~/\xfd y") + chunk(b"IEND", b"")) == []
    told = start + chunk(b"tEXt", b"Source\0/home/someone/run") + chunk(b"IEND", b"")
    assert find_leaks("curves.png", told) == ["the path /home/someone"]
    assert find_leaks("curves.png", start + chunk(b"IEND", b"") + b"/home/someone") == ["the path /home/someone"]


def test_code_of_an_earlier_version_is_replaced() -> None:
    assert is_replaced_by_a_push("products.py")
    assert not is_replaced_by_a_push("mine.py")
