"""Healthy files, made once, and the stand-in for the Hub."""

from pathlib import Path

import pytest

from tests.hub.conftest import hub, server, waits  # noqa: F401  # fixtures
from tests.strangers.healthy import write_all


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that is read; do not change it."""
    root = tmp_path_factory.mktemp("healthy")
    write_all(root)
    return root
