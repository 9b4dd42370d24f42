"""Pushes to a stand-in for the Hub: what becomes visible, and what does not when something goes wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dtfcli.errors import ConfigError, DTFError, HubError
from dtfcli.hub.errors import HubAccessError
from dtfcli.hub.push import PushOptions, push
from tests.conftest import Outcome
from tests.hub.standin import Fault, Hub

NEW = "me/new"
OLD_FILES = {"README.md": b"---\n{}\n---\nold\n", "model.safetensors": b"old", "notes.txt": b"mine"}


def test_everything_in_one_commit(hub: Hub, saved: dict[str, Path], dtf: Callable[..., Outcome]) -> None:
    result = dtf("push", str(saved["dtf"]), NEW)
    assert result.code == 0, result
    assert result.stdout.splitlines()[-1] == f"{hub.url}/me/new"
    assert hub.messages(NEW) == ["initial commit", "Upload dtf model with dtf 0.1.0"]
    files = hub.files(NEW)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_dynamic.py"} <= set(files)
    assert files["model.safetensors"] == (saved["dtf"] / "model.safetensors").read_bytes()
    assert not hub.repositories[NEW].private


def test_a_dry_run_writes_exactly_what_is_uploaded(
    hub: Hub, saved: dict[str, Path], tmp_path: Path, dtf: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "preview"
    result = dtf("push", str(saved["mod"]), NEW, "--dry-run", str(folder))
    assert (result.code, result.stdout.splitlines()[-1]) == (0, str(folder))
    assert hub.requests == []
    push(saved["mod"], NEW)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.files(NEW)


def test_json(hub: Hub, saved: dict[str, Path], dtf: Callable[..., Outcome]) -> None:
    result = dtf("push", str(saved["dense"]), "new", "--json", "--private", "--commit-message", "Hello")
    document = json.loads(result.stdout)
    head = hub.repositories[NEW].branches["main"][-1]
    assert document == {
        "repo": NEW,
        "url": f"{hub.url}/{NEW}",
        "commit": head.oid,
        "files": sorted(hub.files(NEW)),
    }
    assert head.message == "Hello"
    assert hub.repositories[NEW].private
    assert not [name for name in hub.files(NEW) if name.endswith(".py")]


@pytest.mark.parametrize(
    ("repo", "username", "lands_at"),
    [
        ("new", None, "me/new"),
        ("new", "me", "me/new"),
        ("me/new", "me", "me/new"),
        ("Me/new", None, "me/new"),
        ("my-lab/new", None, "my-lab/new"),
        ("new", "my-lab", "my-lab/new"),
    ],
)
def test_owners(hub: Hub, saved: dict[str, Path], repo: str, username: str | None, lands_at: str) -> None:
    assert push(saved["dense"], repo, PushOptions(username=username)).repo == lands_at
    assert list(hub.repositories) == [lands_at]


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("other/new", ["other", "logged in as me", "me/new", "my-lab"]),
        ("readers/new", ["readers", "only read", "admins"]),
    ],
)
def test_another_owners_repository_is_refused(hub: Hub, saved: dict[str, Path], repo: str, words: list[str]) -> None:
    hub.create(repo, files=OLD_FILES)
    with pytest.raises(HubAccessError) as caught:
        push(saved["dense"], repo)
    assert all(word in str(caught.value) for word in words)
    assert hub.files(repo) == OLD_FILES
    assert hub.requests == ["whoami"]


def test_an_existing_repository_gets_a_commit_without_stale_files(hub: Hub, saved: dict[str, Path]) -> None:
    stale = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "routing.py": b"old"}
    hub.create(NEW, private=True, files=OLD_FILES | stale)
    result = push(saved["dense"], NEW, PushOptions(private=True))
    files = hub.files(NEW)
    assert files["notes.txt"] == b"mine"
    assert sorted(files) == sorted([*result.files, "notes.txt"])
    assert len(hub.messages(NEW)) == 2


def test_pushing_the_same_again_makes_no_commit(hub: Hub, saved: dict[str, Path]) -> None:
    first, second = push(saved["dtf"], NEW), push(saved["dtf"], NEW)
    assert first.commit == second.commit
    assert len(hub.messages(NEW)) == 2


def test_a_public_repository_does_not_become_private(hub: Hub, saved: dict[str, Path]) -> None:
    hub.create(NEW, files=OLD_FILES)
    with pytest.raises(ConfigError, match="--private: me/new exists and is public"):
        push(saved["dense"], NEW, PushOptions(private=True))
    assert hub.files(NEW) == OLD_FILES


def test_a_branch_is_made_when_there_is_none(hub: Hub, saved: dict[str, Path]) -> None:
    hub.create(NEW, files=OLD_FILES)
    for _ in range(2):
        result = push(saved["dense"], NEW, PushOptions(revision="v2"))
    assert result.url == f"{hub.url}/me/new/tree/v2"
    assert hub.files(NEW) == OLD_FILES
    assert hub.files(NEW, "v2").keys() == {*result.files, "notes.txt"}
    assert b'from_pretrained("me/new", revision="v2")' in hub.files(NEW, "v2")["README.md"]


def test_a_tag_is_no_branch(hub: Hub, saved: dict[str, Path]) -> None:
    repository = hub.create(NEW, files=OLD_FILES)
    repository.tags["v1"] = repository.branches["main"][0]
    with pytest.raises(ConfigError, match="--revision v1: a tag of me/new"):
        push(saved["dense"], NEW, PushOptions(revision="v1"))


def test_a_large_model_in_shards(hub: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["dense"], tmp_path / "large"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"large": torch.randn(3 << 20)}, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    save_file({"old": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors", {"format": "pt"})
    names = dict.fromkeys(weights, "model-00001-of-00002.safetensors") | {"large": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    result = push(folder, NEW)
    large = hub.repositories[NEW].branches["main"][-1].files["model-00002-of-00002.safetensors"]
    assert large.lfs
    assert large.data == (folder / "model-00002-of-00002.safetensors").read_bytes()
    assert len(large.data) > 12_000_000
    assert result.left_out == ["model-00003-of-00003.safetensors"]


# What can fail, and what it says: each step of a push once, and each kind of failure.
FAULTS = [
    (Fault("whoami", 401), HubAccessError, ["401", "hf auth login"]),
    (Fault("whoami", cut="before"), HubError, ["cannot be reached", "network"]),
    (Fault("info", 403), HubAccessError, ["403", "hf auth login"]),
    (Fault("validate", 400), ConfigError, ["README.md", "metadata"]),
    (Fault("validate", 500), HubError, ["model card", "500"]),
    (Fault("create", 409), HubError, ["somebody else", "409"]),
    (Fault("branch", 403), HubAccessError, ["403"]),
    (Fault("preupload", 403), HubAccessError, ["403"]),
    (Fault("batch", 500), HubError, ["500"]),
    (Fault("store", cut="middle"), HubError, ["cannot be reached"]),
    (Fault("commit", 403), HubAccessError, ["403", "me/new may exist now, without the model"]),
    (Fault("commit", 412), HubError, ["somebody else", "412", "push again"]),
    (Fault("commit", 429, retry_after=3600), HubError, ["429", "3600 s"]),
    (Fault("commit", 500), HubError, ["500", "later"]),
    (Fault("commit", cut="middle"), HubError, ["cannot be reached"]),
]
CASES = [
    (*row, exists) for row in FAULTS for exists in (False, True) if not exists or row[0].route in ("branch", "commit")
]


@pytest.mark.parametrize(
    ("fault", "kind", "words", "exists"),
    CASES,
    ids=[f"{f.route}-{f.cut or f.status}-{'existing' if exists else 'new'}" for f, _, _, exists in CASES],
)
def test_a_failure_leaves_nothing_half_done(
    hub: Hub, saved: dict[str, Path], fault: Fault, kind: type[DTFError], words: list[str], exists: bool
) -> None:
    if exists:
        hub.create(NEW, files=OLD_FILES)
        words = [word for word in words if "may exist now" not in word]
    branch = "v2" if fault.route == "branch" else None
    hub.faults = [replace(fault)]
    with pytest.raises(DTFError) as caught:
        push(saved["dense"], NEW, PushOptions(revision=branch))
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2
    if exists:
        assert hub.files(NEW) == OLD_FILES
        assert hub.messages(NEW) == ["initial commit"]
        assert list(hub.repositories[NEW].branches) == ["main"]
    else:  # a new repository may be there, without the model
        assert NEW not in hub.repositories or hub.files(NEW) == {}, message
    # And when the trouble is over, the same command works.
    hub.faults = []
    push(saved["dense"], NEW, PushOptions(revision=branch))
    assert "model.safetensors" in hub.files(NEW, branch or "main")


@pytest.mark.parametrize("status", [429, 503])
def test_trouble_that_passes_is_waited_for(hub: Hub, saved: dict[str, Path], waits: list[float], status: int) -> None:
    routes = ["whoami", "info", "create", "validate", "preupload", "batch", "store", "commit"]
    hub.faults = [Fault(route, status, times=2, retry_after=7) for route in routes]
    push(saved["dense"], NEW)
    assert len(waits) == 2 * len(routes)
    assert all(7 <= wait <= 8 for wait in waits)
    assert len(hub.messages(NEW)) == 2


def test_waiting_is_bounded(hub: Hub, saved: dict[str, Path], waits: list[float]) -> None:
    hub.faults = [Fault("commit", 500)]
    with pytest.raises(HubError):
        push(saved["dense"], NEW)
    assert hub.requests.count("commit") == 5
    assert sum(waits) < 60


@pytest.mark.parametrize("exists", [False, True], ids=["new", "existing"])
def test_a_commit_whose_answer_got_lost_is_not_made_twice(hub: Hub, saved: dict[str, Path], exists: bool) -> None:
    if exists:
        hub.create(NEW, files=OLD_FILES)
    hub.faults = [Fault("commit", cut="after", times=1)]
    with pytest.raises(HubError, match="a request whose answer got lost; push again"):
        push(saved["dense"], NEW)
    result = push(saved["dense"], NEW)
    assert hub.messages(NEW) == ["initial commit", "Upload dense model with dtf 0.1.0"]
    assert result.commit == hub.repositories[NEW].branches["main"][-1].oid


def test_somebody_elses_commit_meanwhile(hub: Hub, saved: dict[str, Path]) -> None:
    hub.create(NEW, files=OLD_FILES)

    def intrude(message: str) -> None:
        if message == "committing":
            branch = hub.repositories[NEW].branches["main"]
            branch.append(hub.new_commit("theirs", branch[-1].files))

    with pytest.raises(HubError, match="somebody else"):
        push(saved["dense"], NEW, on_progress=intrude)
    assert hub.messages(NEW) == ["initial commit", "theirs"]
    assert hub.files(NEW) == OLD_FILES


def test_ctrl_c_leaves_nothing_of_the_model(hub: Hub, saved: dict[str, Path]) -> None:
    def interrupt(message: str) -> None:
        if message == "committing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(saved["dense"], NEW, on_progress=interrupt)
    assert hub.files(NEW) == {}


def test_a_token_that_only_reads(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, saved: dict[str, Path], dtf: Callable[..., Outcome]
) -> None:
    hub.add_user("me", "hf_" + "r" * 34, role="read")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "r" * 34)
    result = dtf("push", str(saved["dense"]), NEW)
    assert result.code == 2
    assert "may only read" in result.stderr
    assert hub.requests == ["whoami"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ENDPOINT", "http://127.0.0.1:9", "the Hub cannot be reached"),
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE"),
    ],
    ids=["down", "offline"],
)
def test_there_is_no_network(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    saved: dict[str, Path],
    dtf: Callable[..., Outcome],
    name: str,
    value: Any,
    words: str,
) -> None:
    monkeypatch.setattr(constants, name, value)
    result = dtf("push", str(saved["dense"]), NEW)
    assert result.code == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
