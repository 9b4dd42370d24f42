"""`dtf serve`: the real server as a process of its own, asked by the real `openai` client over loopback."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers.cli.serving.model_manager import ModelManager

from dtfcli import load_model, load_tokenizer
from dtfcli.cli.app import run
from dtfcli.generation import Sampling, generate
from dtfcli.serving import server as serving
from tests.conftest import Outcome
from tests.tiny import routed_model, word_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w1{% endif %}"
)
QUESTIONS = ["a b c", "d e f g h i j", "w5 w6"]
LENGTH = 12
KEY = "correct-horse"
SECONDS = 180
"""Until the server must be there: importing takes most of it, on a machine that is busy."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str  # of its model
    client: openai.OpenAI
    folder: Path  # of the model
    pid: int
    log: Path

    def chat(self, question: str, **options: Any) -> Any:
        create: Any = self.client.chat.completions.create
        given = {"model": self.name, "max_tokens": LENGTH, "temperature": 0} | options
        return create(messages=[{"role": "user", "content": question}], **given)

    def expected(self, question: str) -> str:
        """The greedy answer of `dtf generate --chat`."""
        model, tokenizer = load_model(self.folder, device="cpu"), load_tokenizer(self.folder)
        return generate(model, tokenizer, question, Sampling(max_new_tokens=LENGTH), chat=True).text


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final model of a run, with a chat template."""
    folder = tmp_path_factory.mktemp("runs") / "mine" / "final_model"
    routed_model().save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(model_folder, tmp_path_factory.mktemp("log") / "stderr") as running:
        yield running


@contextmanager
def serving_run(model_folder: Path, log: Path) -> Iterator[Server]:
    """`dtf serve RUN` with a key on a free port; ended by Ctrl-C."""
    command = [sys.executable, "-m", "dtfcli", "serve", str(model_folder.parent), "--api-key", KEY]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"NO_COLOR": "1"},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
    try:
        url = _address(process, log)
        http = openai.DefaultHttpxClient(trust_env=False)  # no proxy between us and loopback
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60, http_client=http)
        yield Server(str(model_folder.parent), client, model_folder, process.pid, log)
        client.close()
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 130, log.read_text()
        assert printed == ""  # logs go to stderr
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """Where the server says that it listens; it says so when it answers."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if match := re.search(r"Uvicorn running on (http://[\d.:]+)", log.read_text()):
            return match[1]
        time.sleep(0.1)
    pytest.fail(f"no server: {log.read_text()}")


@pytest.mark.slow
def test_requests_at_once_are_answered_as_the_model_generates(server: Server) -> None:
    """Whole, and streamed in pieces: one for each token whose text is complete at once."""

    def whole(question: str) -> str:
        answer = server.chat(question)
        assert answer.usage.completion_tokens == LENGTH
        return answer.choices[0].message.content

    def streamed(question: str) -> str:
        pieces = [chunk.choices[0].delta.content or "" for chunk in server.chat(question, stream=True)]
        assert question != QUESTIONS[0] or len(list(filter(None, pieces))) == LENGTH
        return "".join(pieces)

    requests = [(ask, question) for question in QUESTIONS for ask in (whole, streamed)]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: request[0](request[1]), requests))
    assert answers == [server.expected(question) for _, question in requests]


@pytest.mark.slow
def test_completions_and_responses(server: Server) -> None:
    expected, client = server.expected(QUESTIONS[0]), server.client
    given: dict[str, Any] = {"model": server.name, "temperature": 0}
    prompt = f"{QUESTIONS[0]} w1"
    assert client.completions.create(**given, prompt=prompt, max_tokens=LENGTH).choices[0].text == expected
    chunks = client.completions.create(**given, prompt=prompt, max_tokens=LENGTH, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    given |= {"input": QUESTIONS[0], "max_output_tokens": LENGTH}
    assert client.responses.create(**given, stream=False).output_text == expected
    events = [event for event in client.responses.create(**given, stream=True) if event.type.endswith(".delta")]
    assert "".join(event.delta for event in events) == expected


@pytest.mark.slow
def test_the_key_is_asked_for_and_shown_nowhere(server: Server) -> None:
    for key in ("none", KEY + "x", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            server.client.with_options(api_key=key).models.list()
    assert server.client.models.list().data
    assert KEY not in server.log.read_text()
    if (processes := Path("/proc")).is_dir():
        shown = (processes / str(server.pid) / "cmdline").read_bytes().split(b"\0")
        assert b"serve" in shown
        assert not [part for part in shown if KEY.encode() in part or b"--api" in part]


@pytest.mark.slow
def test_the_model_has_one_name(server: Server) -> None:
    if hasattr(ModelManager, "list_models"):  # older servers list the Hub's cache
        assert [model.id for model in server.client.models.list()] == [server.name]
    with pytest.raises(openai.BadRequestError):
        server.chat("a", model="another")


def _refused(result: Outcome, *words: str) -> None:
    assert result.code == 2, result
    assert all(word in result.stderr for word in words), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken(dtf: Callable[..., Outcome], model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = dtf("serve", str(model_folder), "--host", "127.0.0.1", "--port", str(port))
    _refused(result, f"--port {port}", "another program listens there", "0 for any free one")


def test_without_the_packages(dtf: Callable[..., Outcome], model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    _refused(dtf("serve", str(model_folder), "--port", "0"), "pip install 'dtfcli[serve]'")


def test_without_a_chat_template(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    monkeypatch.setattr(serving, "serve", lambda *_, **__: None)
    assert run(["serve", str(tmp_path / "model"), "--port", "0", "--device", "cpu"]) == 0
    assert "no chat template: /v1/completions answers" in capsys.readouterr().err
