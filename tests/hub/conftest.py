"""A stand-in for the Hub that the real client talks to, and small models to push."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from dtfcli.hub import client
from tests.hub.standin import Hub
from tests.tiny import dense_model, routed_model, word_tokenizer

TOKEN = "hf_" + "x" * 34


@pytest.fixture
def server() -> Iterator[Hub]:
    """A Hub on which `me` may write, also for `my-lab`."""
    with Hub() as standin:
        standin.add_user("me", TOKEN, orgs={"my-lab": "write", "readers": "read"})
        yield standin


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds between the tries; no time passes."""
    waited: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waited.append)
    monkeypatch.setattr(_http.time, "sleep", waited.append)
    return waited


@pytest.fixture
def hub(server: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, with this process logged in there as `me`."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return server


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token anywhere."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders as `save_pretrained` leaves them: dtf, mod and dense; do not change them."""
    root = tmp_path_factory.mktemp("saved")
    models = {name: routed_model(architecture=name) for name in ("dtf", "mod")} | {"dense": dense_model()}
    for name, model in models.items():
        model.save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture
def model(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A DTF model folder of one's own."""
    return Path(shutil.copytree(saved["dtf"], tmp_path / "model"))
