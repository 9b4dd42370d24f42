"""What a push would publish: complete enough to open anywhere, and nothing that belongs to this machine."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dtfcli.errors import CheckpointError
from dtfcli.experiment import train
from dtfcli.hub.leaks import find_leaks
from dtfcli.hub.upload import prepare_upload
from tests.conftest import Outcome
from tests.training.small_runs import small_settings

SECRET = "hf_" + "AbCdEfGhIj" * 3

READER = """
import json, re, sys
from pathlib import Path
sys.modules["dtfcli"] = None  # importing it fails
for folder in sys.argv[1:]:
    code = re.search(r"```python\\n(.*?)```", Path(folder, "README.md").read_text("utf-8"), re.DOTALL).group(1)
    names = {}
    exec(code.replace("me/new", folder), names)
    model, tokenizer = names["model"], names["tokenizer"]
    assert type(model).__module__.startswith("transformers"), type(model).__module__
    prompt = tokenizer("the cat", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    print(json.dumps(tokenizer.decode(ids, skip_special_tokens=True)))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on local text, with checkpoints and all; do not change it."""
    return train(small_settings(tmp_path_factory.mktemp("run"))).run_dir


@pytest.mark.slow
def test_the_code_of_a_card_runs_where_dtfcli_is_not_installed(
    run: Path, saved: dict[str, Path], tmp_path: Path, dtf: Callable[..., Outcome]
) -> None:
    assert dtf("push", str(run), "me/new", "--dry-run", str(tmp_path / "dtf")).code == 0
    for name in ("mod", "dense"):
        prepare_upload(saved[name], "me/new").write(tmp_path / name)
    reader = subprocess.run(
        [sys.executable, "-c", READER, *(str(tmp_path / name) for name in ("mod", "dense", "dtf"))],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        input="",
    )
    assert reader.returncode == 0, reader.stderr[-3000:]
    assert "Do you wish to run" not in reader.stdout
    ours = dtf("generate", str(run), "the cat", "--max-new-tokens", "12", "--capacity", "0.25")  # as in the card
    assert json.loads(reader.stdout.splitlines()[-1]) == ours.stdout.removesuffix("\n")


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
    kept = {
        "custom_tokens": {"eos_token": "</s>", "sep": "/", "pad_token": "/no_think"},
        "added_tokens_decoder": {"3": {"content": "/a/b"}},
        "names": ["a/b", "owner/name"],
        "initializer_range": 0.02,
    }
    _change(model / "config.json", _name_or_path="/home/jane/base", custom="/data/jane/x", **kept)
    _change(model / "tokenizer_config.json", name_or_path="/home/jane/tok", tokenizer_file=str(tmp_path / "t.json"))
    _change(model / "generation_config.json", cache_dir="~/.cache", max_length=7)
    upload = prepare_upload(model, "me/new")
    documents = {name: json.loads(upload.files[f"{name}.json"]) for name in ("config", "generation_config")}
    assert {name: documents["config"][name] for name in kept} == kept
    assert documents["generation_config"]["max_length"] == 7
    everything = b"".join(item for item in upload.files.values() if isinstance(item, bytes))
    assert b"jane" not in everything
    assert str(tmp_path).encode() not in everything
    assert b".cache" not in everything


@pytest.mark.parametrize(
    ("name", "content", "leak"),
    [
        ("config.json", f'{{"a": "{SECRET}"}}', "a Hugging Face token"),
        ("README.md", "export WANDB_API_KEY=" + "0123456789" * 4, "a Weights & Biases key"),
        ("README.md", "ghp_" + "a1" * 18, "a GitHub token"),
        ("README.md", "see AKIAABCDEFGHIJKLMNOP", "an AWS key"),
        ("modeling.py", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("modeling.py", 'open("/home/jane/data.txt")', "the path /home/jane"),
        ("README.md", r"from C:\Users\jane", "the path"),
        ("README.md", "from ~/models", "the path"),
        ("README.md", f"in {Path.home()}/x", "the path"),
        ("tokenizer.json", json.dumps({"truncation": {"from": "/home/jane/x"}, "model": {}}), "the path /home/jane"),
        ("tokenizer.json", json.dumps({"model": {"vocab": {SECRET: 1}}}), "a Hugging Face token"),
        ("config.json", pickle.dumps({"a": 1}), "a pickle or an archive"),
        ("tokenizer.model", b"PK\x03\x04....", "a pickle or an archive"),
        ("curves.png", b"no picture", "not a .png file"),
        ("curves.png", b"\x89PNG\r\n\x1a\n...Software\x00/home/jane/x", "the path /home/jane"),
        ("model.safetensors", pickle.dumps({"a": 1}), "not a safetensors file"),
        ("model.safetensors", (64).to_bytes(8, "little") + b"\x00" * 64, "not a safetensors file"),
        ("config.json", b"\xff\xfe", "bytes that are not text"),
    ],
)
def test_leaks_are_found(name: str, content: str | bytes, leak: str, tmp_path: Path) -> None:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / "file").write_bytes(data)
    for given in (tmp_path / "file", *([] if name == "model.safetensors" else [data])):
        leaks = find_leaks(name, given)
        assert any(leak in text for text in leaks), leaks


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


def _append(path: Path, text: str) -> None:
    path.write_text((path.read_text() if path.exists() else "") + f"\n{text}\n")


def _name_a_source(weights: Path) -> None:
    save_file(load_file(weights), weights, {"format": "pt", "source": "/home/jane/run"})


@pytest.mark.parametrize(
    ("name", "spoil", "leak"),
    [
        ("modeling_dynamic.py", lambda path: _append(path, f"TOKEN = '{SECRET}'"), "a Hugging Face token"),
        ("chat_template.jinja", lambda path: _append(path, "{# /home/jane/x #}"), "the path /home/jane"),
        ("model.safetensors", _name_a_source, "the path /home/jane"),
    ],
)
def test_a_leak_that_cannot_be_cleaned_stops_the_push(
    model: Path, name: str, spoil: Callable[[Path], None], leak: str
) -> None:
    spoil(model / name)
    with pytest.raises(CheckpointError, match=re.escape(f"{name}: holds {leak}") + ".*not be published") as caught:
        prepare_upload(model, "me/new")
    assert SECRET not in str(caught.value)


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


def test_pixels_are_not_searched() -> None:
    """Compressed pixels look like a path now and then; the text of a picture is searched all the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + bytes(4)

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13))
    assert find_leaks("curves.png", start + chunk(b"IDAT", b"x ~/\xfd y") + chunk(b"IEND", b"")) == []
    told = start + chunk(b"tEXt", b"Source\0/home/someone/run") + chunk(b"IEND", b"")
    assert find_leaks("curves.png", told) == ["the path /home/someone"]
    assert find_leaks("curves.png", start + chunk(b"IEND", b"") + b"/home/someone") == ["the path /home/someone"]
