"""What the tests of building and opening models share."""

import shutil
from pathlib import Path

import pytest

from tests.tiny import dense_model, routed_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model folder, a routed one, and a run folder around it."""
    root = tmp_path_factory.mktemp("models")
    dense_model().save_pretrained(root / "dense")
    routed_model(capacity=0.25).save_pretrained(root / "routed")
    run = root / "outputs" / "2026-01-01" / "mine"
    run.mkdir(parents=True)
    (run / "settings.toml").write_text("")
    shutil.copytree(root / "routed", run / "final_model")
    return root
