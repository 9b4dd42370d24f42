"""Pushes to a stand-in for the Hub: what becomes visible, and what does not when something goes wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dtfcli.errors import ConfigError, DTFError, HubError
from dtfcli.hub.errors import HubAccessError
from dtfcli.hub.push import push
from dtfcli.hub.space import SDK_VERSION
from dtfcli.hub.upload import PushOptions
from tests.conftest import Outcome
from tests.hub.standin import Fault, Hub

NEW = "me/new"
OLD_FILES = {"README.md": b"---\n{}\n---\nold\n", "model.safetensors": b"old", "notes.txt": b"mine"}


def test_one_commit_of_exactly_the_files_of_a_dry_run(
    hub: Hub, saved: dict[str, Path], tmp_path: Path, dtf: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "preview"
    result = dtf("push", str(saved["mod"]), NEW, "--dry-run", str(folder))
    assert (result.code, result.stdout.splitlines()[-1]) == (0, str(folder))
    assert hub.requests == []
    result = dtf("push", str(saved["mod"]), NEW)
    assert (result.code, result.stdout.splitlines()[-1]) == (0, f"{hub.url}/me/new")
    assert hub.messages(NEW) == ["initial commit", f"Upload mod model with dtf {version('dtfcli')}"]
    files = hub.files(NEW)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_dynamic.py"} <= set(files)
    assert files["model.safetensors"] == (saved["mod"] / "model.safetensors").read_bytes()
    assert not hub.repositories[NEW].private


def test_json(hub: Hub, saved: dict[str, Path], dtf: Callable[..., Outcome]) -> None:
    result = dtf("push", str(saved["dense"]), "new", "--json", "--private", "--commit-message", "Hello")
    head = hub.repositories[NEW].branches["main"][-1]
    names = sorted(hub.files(NEW))
    assert json.loads(result.stdout) == {
        "repo": NEW,
        "url": f"{hub.url}/{NEW}",
        "commit": head.oid,
        "files": names,
    }
    assert head.message == "Hello"
    assert hub.repositories[NEW].private
    assert not [name for name in names if name.endswith(".py")]


@pytest.mark.parametrize(
    ("repo", "username", "lands_at"),
    [
        ("new", "me", "me/new"),
        ("Me/new", None, "me/new"),
        ("my-lab/new", None, "my-lab/new"),
        ("new", "my-lab", "my-lab/new"),
    ],
)
def test_owners(hub: Hub, saved: dict[str, Path], repo: str, username: str | None, lands_at: str) -> None:
    assert push(saved["dense"], repo, PushOptions(username=username)).upload.repo == lands_at
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
    assert sorted(files) == sorted([*result.upload.files, "notes.txt"])
    assert push(saved["dense"], NEW).commit == result.commit
    assert len(hub.messages(NEW)) == 2, "the same files again are no new commit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PushOptions(private=True), "--private: me/new exists and is public"),
        (PushOptions(revision="v1"), "--revision v1: a tag of me/new"),
    ],
)
def test_what_does_not_fit_a_repository(hub: Hub, saved: dict[str, Path], options: PushOptions, message: str) -> None:
    repository = hub.create(NEW, files=OLD_FILES)
    repository.tags["v1"] = repository.branches["main"][0]
    with pytest.raises(ConfigError, match=message):
        push(saved["dense"], NEW, options)
    assert hub.messages(NEW) == ["initial commit"]


def test_a_branch_is_made_when_there_is_none(hub: Hub, saved: dict[str, Path]) -> None:
    hub.create(NEW, files=OLD_FILES)
    for _ in range(2):
        result = push(saved["dense"], NEW, PushOptions(revision="v2"))
    assert result.url == f"{hub.url}/me/new/tree/v2"
    assert hub.files(NEW) == OLD_FILES
    assert hub.files(NEW, "v2").keys() == {*result.upload.files, "notes.txt"}
    assert b'from_pretrained("me/new", revision="v2")' in hub.files(NEW, "v2")["README.md"]


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
    large = hub.files(NEW)["model-00002-of-00002.safetensors"]
    assert large == (folder / "model-00002-of-00002.safetensors").read_bytes()
    assert len(large) > 12_000_000
    assert large in hub.objects.values(), "stored before the commit"
    assert result.upload.left_out == ["model-00003-of-00003.safetensors"]


# Each step of a push fails once, and each kind of failure; "existing": the repository exists before.
FAULTS = [
    (Fault("whoami", 401), "", HubAccessError, ["401", "hf auth login"]),
    (Fault("whoami", cut="before"), "", HubError, ["cannot be reached", "network"]),
    (Fault("info", 403), "", HubAccessError, ["403", "hf auth login"]),
    (Fault("validate", 400), "", ConfigError, ["README.md", "metadata"]),
    (Fault("validate", 500), "", HubError, ["model card", "500"]),
    (Fault("create", 409), "", HubError, ["somebody else", "409"]),
    (Fault("branch", 403), "existing", HubAccessError, ["403"]),
    (Fault("preupload", 403), "", HubAccessError, ["403"]),
    (Fault("batch", 500), "", HubError, ["500"]),
    (Fault("store", cut="middle"), "", HubError, ["cannot be reached"]),
    (Fault("commit", 403), "", HubAccessError, ["403", "me/new may exist now, without the model"]),
    (Fault("commit", 412), "existing", HubError, ["somebody else", "412", "push again"]),
    (Fault("commit", 429, retry_after=3600), "existing", HubError, ["429", "3600 s"]),
    (Fault("commit", 500), "existing", HubError, ["500", "later"]),
    (Fault("commit", cut="middle"), "existing", HubError, ["cannot be reached"]),
]


@pytest.mark.parametrize(
    ("fault", "existing", "kind", "words"),
    FAULTS,
    ids=[f"{row[0].route}-{row[0].cut or row[0].status}" for row in FAULTS],
)
def test_a_failure_leaves_nothing_half_done(
    hub: Hub, saved: dict[str, Path], fault: Fault, existing: str, kind: type[DTFError], words: list[str]
) -> None:
    if existing:
        hub.create(NEW, files=OLD_FILES)
    hub.faults = [replace(fault)]
    with pytest.raises(DTFError) as caught:
        push(saved["dense"], NEW, PushOptions(revision="v2" if fault.route == "branch" else None))
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert all(word in message for word in words), message
    if existing:
        assert hub.files(NEW) == OLD_FILES
        assert hub.messages(NEW) == ["initial commit"]
        assert list(hub.repositories[NEW].branches) == ["main"]
    else:  # a new repository may be there, without the model
        assert NEW not in hub.repositories or hub.files(NEW) == {}, message


@pytest.mark.parametrize("status", [429, 503])
def test_trouble_that_passes_is_waited_for(hub: Hub, saved: dict[str, Path], waits: list[float], status: int) -> None:
    routes = ["whoami", "info", "create", "validate", "preupload", "batch", "store", "commit"]
    hub.faults = [Fault(route, status, times=2, retry_after=7) for route in routes]
    push(saved["dense"], NEW)
    assert len(waits) == 2 * len(routes)
    assert all(7 <= wait <= 8 for wait in waits)
    assert len(hub.messages(NEW)) == 2


def test_waiting_is_bounded_and_the_next_push_goes_on(hub: Hub, saved: dict[str, Path], waits: list[float]) -> None:
    hub.faults = [Fault("commit", 500)]
    with pytest.raises(HubError):
        push(saved["dense"], NEW)
    assert hub.requests.count("commit") == 5
    assert sum(waits) < 60
    hub.faults = []
    push(saved["dense"], NEW)  # into the repository that the first one left empty
    assert hub.messages(NEW) == ["initial commit", f"Upload dense model with dtf {version('dtfcli')}"]


def test_a_commit_whose_answer_got_lost_is_not_made_twice(hub: Hub, saved: dict[str, Path]) -> None:
    hub.faults = [Fault("commit", cut="after", times=1)]
    with pytest.raises(HubError, match="a request whose answer got lost; push again"):
        push(saved["dense"], NEW)
    result = push(saved["dense"], NEW)
    assert hub.messages(NEW) == ["initial commit", f"Upload dense model with dtf {version('dtfcli')}"]
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
    value: object,
    words: str,
) -> None:
    monkeypatch.setattr(constants, name, value)
    result = dtf("push", str(saved["dense"]), NEW)
    assert result.code == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_space_shows_the_model(
    hub: Hub, saved: dict[str, Path], tmp_path: Path, dtf: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, command = tmp_path / "preview", ["push", str(saved["dtf"]), NEW, "--space", "me/page"]
    assert dtf(*command, "--dry-run", str(folder)).code == 0
    assert hub.requests == []
    for _ in range(2):  # a Space that is there is written again
        result = dtf(*command, "--private", "--json")
        assert result.code == 0, result.stderr
        assert json.loads(result.stdout)["space"] == f"{hub.url}/spaces/me/page"
    files = hub.files("me/page")
    assert {path.name: path.read_bytes() for path in (folder / "space").iterdir()} == files
    assert "space" not in hub.files(NEW)
    assert hub.repositories["me/page"].private
    header = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (header["sdk"], header["app_file"], header["models"]) == ("gradio", "app.py", [NEW])
    assert header["sdk_version"] == SDK_VERSION
    assert files["requirements.txt"] == b"dtfcli[demo]\n"
    monkeypatch.setattr("dtfcli.cli.app.run", " ".join)
    with pytest.raises(SystemExit, match=f"^demo {NEW} --host 0.0.0.0 --port 7860 --no-api-key$"):
        exec(files["app.py"].decode())


@pytest.mark.parametrize(("space", "words"), [("page", "OWNER/NAME"), ("other/page", "logged in as me")])
def test_a_space_that_cannot_be_is_refused_first(hub: Hub, saved: dict[str, Path], space: str, words: str) -> None:
    with pytest.raises(DTFError, match=words):
        push(saved["dense"], NEW, PushOptions(space=space))
    assert hub.repositories == {}


def test_a_space_that_fails_says_that_the_model_is_there(hub: Hub, saved: dict[str, Path]) -> None:
    hub.create("me/page")
    hub.repositories["me/page"].branches["main"].clear()
    with pytest.raises(HubError, match=r"the model is on the Hub, the Space me/page is not finished"):
        push(saved["dense"], NEW, PushOptions(space="me/page"))
    assert "model.safetensors" in hub.files(NEW)
