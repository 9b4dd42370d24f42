"""Answers that are not the Hub's: of a proxy, of a network's login page, or damaged."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtfcli.errors import DTFError
from dtfcli.hub.push import push
from dtfcli.hub.upload import PushOptions
from tests.budget import examples
from tests.hub.standin import Answer, Handler, Hub
from tests.strangers.damage import DEEP, changed
from tests.strangers.test_readers import QUIET

ROUTES = ("whoami", "validate", "create", "info", "refs", "branch", "preupload", "batch", "commit")
BODIES = (b"", b"<html>Log in</html>", b"[" * DEEP, "ä".encode("utf-16"), *b"\xff\xfe { null 3 [] {}".split())


def push_with(rng: Random, route: str, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One push, during which a route answers amiss."""
    hub.repositories.clear()
    if rng.random() < 0.5:
        hub.create("me/new", files={"README.md": b"---\n{}\n---\nold\n"})
    healthy = getattr(Handler, f"on_{route}")

    def answer(self: Handler, *args: Any, **named: Any) -> Answer:
        honest = healthy(self, *args, **named)
        spoiled = json.dumps(changed(rng, honest.body or {})[0]).encode()
        return Answer(honest.status, rng.choice(BODIES) if rng.random() < 0.3 else spoiled)

    with monkeypatch.context() as patch:
        patch.setattr(Handler, f"on_{route}", answer)
        try:
            push(model, "me/new", PushOptions(revision="v1" if route == "branch" else None))
        except DTFError as error:
            message = str(error)
            assert len(message) < 800, message
            assert message.endswith((".", "?")), message


@pytest.mark.parametrize("count", [examples(5), pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("route", ROUTES)
def test_odd_answers(route: str, count: int, hub: Hub, healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @settings(max_examples=count, derandomize=count < 50, **QUIET)
    @given(seed=st.integers(0, 2**32))
    def cases(seed: int) -> None:
        push_with(Random(seed), route, hub, healthy / "models" / "dense", monkeypatch)

    cases()
