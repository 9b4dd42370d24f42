"""Who may use `dtf serve` and `dtf demo`, and what a request may name."""

import asyncio
import hmac
import json
import os
import signal
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from dtfcli.demo.page import Demo
from dtfcli.errors import ConfigError
from dtfcli.serving import server
from dtfcli.serving.access import Access, KeyGate, hide_key, require_access, without_key
from dtfcli.serving.requests import FIELDS, Limits, RequestGate
from dtfcli.settings.sources import parse_environment
from tests.cli.test_serve import KEY, TEMPLATE
from tests.tiny import dense_model, word_tokenizer

NAME, POSITIONS = "tiny", 64
CHAT, COMPLETION, RESPONSE = FIELDS
BEARER = {"authorization": f"Bearer {KEY}"}


def asked(app: Any, path: str, body: Any = None, method: str = "POST", **headers: str) -> httpx.Response:
    """The answer of an app in this process."""
    content = body if body is None or isinstance(body, (bytes, AsyncIterator)) else json.dumps(body).encode()

    async def ask() -> httpx.Response:
        given = {"content-type": "application/json"} | headers
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, content=content, headers=given)

    return asyncio.run(ask())


def kept(apps: list[Any]) -> type:
    """Instead of Uvicorn's server: one that keeps the app and does not run it."""

    class Kept:
        def __init__(self, config: Any) -> None:
            apps.append(config.app)

        def run(self) -> None:
            pass

    return Kept


@pytest.fixture(scope="module")
def app() -> Any:
    """What `serve` would run: Transformers' server with a small model, behind its gates."""
    tokenizer, apps = word_tokenizer(), list[Any]()
    tokenizer.chat_template = TEMPLATE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Server", kept(apps))
        model = dense_model(max_position_embeddings=POSITIONS)
        server.serve(NAME, model, tokenizer, access=Access(KEY, ("https://mine.example",)))
    return apps[0]


class Echo:
    """An ASGI app that answers with the body it gets, or waits for an event."""

    def __init__(self, wait: asyncio.Event | None = None) -> None:
        self.wait, self.was_cancelled, self.calls = wait, False, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        message = await receive()
        try:
            if self.wait:
                await self.wait.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})


def test_the_key(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, compare = list[tuple[bytes, bytes]](), hmac.compare_digest

    def noted(*pair: bytes) -> bool:
        compared.append((pair[0], pair[1]))
        return compare(*pair)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    body = {"model": NAME, "prompt": "a b", "max_tokens": 2}
    wrong = [{}, {"authorization": "Bearer"}, {"authorization": "Bearer correct-horsf"}, {"x-api-key": KEY}]
    wrong += [{"authorization": f"Basic {b64encode(f':{KEY}'.encode()).decode()}"}, {"authorization": KEY}]
    for headers in wrong:
        for path, method in ((COMPLETION, "POST"), ("/v1/models", "GET"), ("/docs", "GET"), ("/load_model", "POST")):
            answer = asked(app, path, body, method, **headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="dtf"')
            assert KEY not in answer.text
    assert (b"correct-horsf", KEY.encode()) in compared
    assert asked(app, "/health", method="GET").json() == {"status": "ok"}
    assert asked(app, COMPLETION, body, **BEARER).json()["usage"]["completion_tokens"] == 2
    assert asked(app, "/v1/models", method="GET", **BEARER).json()["data"][0]["id"] == NAME
    assert asked(app, COMPLETION, body, authorization=f"bearer  {KEY}").status_code == 200


def test_a_browser_gives_the_key_as_password() -> None:
    gate = KeyGate(Echo(), KEY, "Basic")
    for given, status in ((f"me:{KEY}", 200), (f":{KEY}", 200), (f"{KEY}:", 401), ("me:no", 401)):
        header = f"Basic {b64encode(given.encode()).decode()}"
        assert asked(gate, "/", b"", authorization=header).status_code == status
    answer = asked(gate, "/", b"", authorization="Basic !")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Basic realm="dtf"')


def test_the_demo_asks_for_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    apps: list[Any] = []
    monkeypatch.setattr(uvicorn, "Server", kept(apps))
    Demo("tiny", dense_model(), word_tokenizer()).serve("0.0.0.0", 0, KEY)
    password = f"Basic {b64encode(f'x:{KEY}'.encode()).decode()}"
    for path in ("/", "/config", "/gradio_api/queue/data"):
        assert asked(apps[0], path, method="GET").status_code == 401
    assert "dtf demo" in asked(apps[0], "/", method="GET", authorization=password).text
    file = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\ntext\r\n--x--\r\n'
    upload = {"content-type": "multipart/form-data; boundary=x", "authorization": password}
    assert asked(apps[0], "/gradio_api/upload", file, **upload).status_code == 413


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "example.org", "127.0.0.1.example.org", ""])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host .*DTF_API_KEY.*--no-api-key.*localhost"):
        require_access(host, None, no_api_key=False)
    require_access(host, KEY, no_api_key=False)
    require_access(host, None, no_api_key=True)


def test_this_machine_needs_none() -> None:
    for host in ("localhost", "127.0.0.1", "127.8.9.1", "::1"):
        require_access(host, None, no_api_key=False)
    for key in ("", "a b", "schlüssel", "a\n"):
        with pytest.raises(ConfigError, match="--api-key: a key is") as error:
            require_access("localhost", key, no_api_key=False)
        assert not key or key not in str(error.value)


def test_an_empty_variable_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTF_API_KEY", "")
    with pytest.raises(ConfigError, match="--api-key: a key is"):
        require_access("localhost", None, no_api_key=False)


def test_the_key_leaves_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["python", "dtf", "serve", "m"]
    for given in (["--api-key", KEY], [f"--api-key={KEY}"], [f"--api_key={KEY}"], ["--api_key", KEY]):
        assert without_key([*line, *given, "--port", "0"]) == [*line, "--port", "0"]
    assert without_key([*line, "--", "--api-key", "x"]) == [*line, "--", "--api-key", "x"]
    called: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: called.append(given))
    hide_key(KEY)  # it comes from the environment
    assert not called
    monkeypatch.setattr(sys, "orig_argv", [*line, "--api-key", KEY])
    hide_key(KEY)
    assert called[0][:2] == (sys.executable, [sys.executable, *line[1:]])
    assert called[0][2]["DTF_API_KEY"] == KEY
    monkeypatch.setenv("DTF_API_KEY", KEY)
    assert parse_environment(lambda _: False) == {}  # no setting of a run


PICTURE = {"type": "image_url", "image_url": {"url": "{url}"}}
SAID = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def _content(part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}]}


NAMING: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"model": "another/model"}, "model"),
    (CHAT, {"model": "../../etc/passwd"}, "model"),
    (CHAT, {"model": "{file}"}, "model"),
    (CHAT, {"model": f"{NAME}@main"}, "model"),
    (CHAT, {"model": f"{NAME}:weights.gguf"}, "model"),
    (CHAT, {"model": "{url}"}, "model"),
    (CHAT, {"model": [NAME]}, "model"),
    (COMPLETION, {"model": "file://{file}", "prompt": "a"}, "model"),
    (RESPONSE, {"model": "", "input": "a"}, "model"),
    (CHAT, {"revision": "main"}, "revision"),
    (CHAT, {"trust_remote_code": True}, "trust_remote_code"),
    (CHAT, {"adapter": "{file}"}, "adapter"),
    (CHAT, {"lora_path": "{file}"}, "lora_path"),
    (CHAT, {"processor": "{file}"}, "processor"),
    (CHAT, {"tokenizer": "another/model"}, "tokenizer"),
    (CHAT, {"custom_generate": "another/model"}, "custom_generate"),
    (CHAT, {"generation_config": '{"custom_generate": "another/model"}'}, "generation_config"),
    (COMPLETION, {"prompt": "a", "generation_config": '{"max_new_tokens": 99999}'}, "generation_config"),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"chat_template_kwargs": {"chat_template": "{% include '{file}' %}"}}, "chat_template_kwargs.chat_template"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": "{file}"}}, "chat_template_kwargs.enable_thinking"),
    (CHAT, {"documents": ["{file}"]}, "documents"),
    (CHAT, _content(PICTURE), "messages[0].content[0].type"),
    (CHAT, _content({"type": "image_url", "image_url": {"url": "file://{file}"}}), "messages[0].content[0].type"),
    (CHAT, _content({"type": "audio_url", "audio_url": {"url": "{url}"}}), "messages[0].content[0].type"),
    (CHAT, _content({"type": "video_url", "video_url": {"url": "{url}"}}), "messages[0].content[0].type"),
    (CHAT, _content({"type": "input_audio", "input_audio": "{file}"}), "messages[0].content[0].type"),
    (CHAT, _content({"type": "text", "text": "a", "image_url": "{url}"}), "messages[0].content[0].image_url"),
    (CHAT, _content({"type": ["text"], "text": "a"}), "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "image": "{file}"}]}, "messages[0].image"),
    (RESPONSE, {"input": [{"type": "input_image", "image_url": "{url}"}]}, "input[0].type"),
    (RESPONSE, {"input": [{"type": "input_file", "file_id": "{file}"}]}, "input[0].type"),
    (RESPONSE, {"input": "a", "prompt": {"id": "pmpt_1"}}, "prompt"),
    (RESPONSE, {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
    (RESPONSE, {"input": "a", "tools": [{"type": "mcp", "server_url": "{url}"}]}, "tools"),
    (CHAT, {"web_search_options": {}}, "web_search_options"),
    ("/load_model", {"model": "another/model"}, "/load_model"),
    ("/reset", {}, "/reset"),
    ("/v1/systemone", {"model": NAME, "state": "a", "assets": {"x": {"url": "{url}"}}}, "/v1/systemone"),
    ("/v1/audio/transcriptions", {"model": "another/model"}, "/v1/audio/transcriptions"),
    ("/v1/../load_model", {"model": "another/model"}, "load_model"),
]
"""Requests that name another model, a file, an address or code; what the answer has to name."""

_opened: list[tuple[str, Any]] = []
_is_watching = [False]


def _watch(event: str, given: Any) -> None:
    if _is_watching[0] and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "import"):
        _opened.append((event, given))


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """Files that are opened, addresses that are asked for and modules that are imported, meanwhile."""
    if _watch not in _hooks:
        _hooks.append(_watch)
        sys.addaudithook(_watch)
    _opened.clear()
    yield _opened
    _is_watching[0] = False


_hooks: list[Any] = []


def test_no_request_names_a_model_a_file_or_code(app: Any, opened: list[Any], tmp_path: Path) -> None:
    (secret := tmp_path / "secret").write_text("{}")
    assert len(NAMING) >= 30
    with_defaults = [(path, {"messages": SAID} | body if path == CHAT else body, word) for path, body, word in NAMING]
    filled = json.dumps([body for _, body, _ in with_defaults]).replace("{file}", str(secret))
    bodies = json.loads(filled.replace("{url}", "http://127.0.0.1:9/picture.png"))
    asked(app, CHAT, bodies[0], **BEARER)  # what httpx and json import and open is there
    for (path, _, word), body in zip(with_defaults, bodies, strict=True):
        answer = _watched(app, path, body)
        assert 400 <= answer.status_code < 500, (path, body, answer.text)
        assert word in answer.json()["error"]["message"]
        assert len(answer.text) < 400
    assert not opened


def _watched(app: Any, path: str, body: Any) -> httpx.Response:
    """The answer to a request, while `opened` collects what it opens."""

    async def watching(scope: Any, receive: Any, send: Any) -> None:
        _is_watching[0] = True
        try:
            await app(scope, receive, send)
        finally:
            _is_watching[0] = False

    return asked(watching, path, body, **BEARER)


def test_what_is_watched_is_seen(opened: list[Any], tmp_path: Path) -> None:
    async def opens(scope: Any, receive: Any, send: Any) -> None:
        (tmp_path / "x").write_text("")
        await Echo()(scope, receive, send)

    _watched(opens, "/", b"")
    assert [event for event, _ in opened] == ["open"]


def test_clients_of_openai_may_say_what_they_say(app: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"url": "x"}'}}
    messages = [*SAID, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "1", "content": "b"}]
    messages += [{"role": "user", "content": [{"type": "text", "text": "http://x ../../etc/passwd"}]}]
    ignored = {"user": "me", "n": 1, "presence_penalty": 0, "stream_options": {"include_usage": True}, "stop": None}
    body = {"model": NAME, "messages": SAID, "max_completion_tokens": 2, "temperature": 0} | ignored
    assert asked(app, CHAT, body, **BEARER).status_code == 200
    more = {"messages": messages, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    assert asked(RequestGate(Echo(), NAME, Limits(9)), CHAT, body | more).json()["messages"] == messages
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}]
    answer = asked(app, RESPONSE, {"input": items, "max_output_tokens": 2, "stream": False}, **BEARER)
    assert answer.status_code == 200
    assert answer.json()["usage"]["output_tokens"] == 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not JSON"),
        (b'{"model": "other", "model": "tiny", "prompt": 1}', "prompt: should be str"),
        ({"prompt": "a", "temperature": "hot"}, "temperature: should be int or float"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens: should be int"),
        ({"prompt": "a", "max_tokens": POSITIONS + 1}, f"should be 1 to {POSITIONS}"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop: at most 16"),
        ({"prompt": "a", "stop": "x" * 201}, "of at most 200 characters"),
        ({"prompt": "a", "max_tokens": 0}, f"should be 1 to {POSITIONS}"),
    ],
)
def test_wrong_fields(app: Any, body: Any, words: str) -> None:
    answer = asked(app, COMPLETION, body, **BEARER)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_texts_end_at_the_models_positions(app: Any) -> None:
    answer = asked(app, COMPLETION, {"prompt": " ".join("a" * 60)}, **BEARER).json()
    assert (answer["usage"]["total_tokens"], answer["choices"][0]["finish_reason"]) == (POSITIONS, "length")
    for stream in (True, False):
        answer = asked(app, COMPLETION, {"prompt": " ".join("a" * 64), "stream": stream}, **BEARER)
        assert answer.status_code == 400
        assert "64 tokens" in answer.text


def test_pages_of_others_may_not_ask(app: Any) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    stranger = asked(app, COMPLETION, body, origin="https://other.example", **BEARER)
    assert stranger.status_code == 403
    assert "access-control-allow-origin" not in stranger.headers
    mine = asked(app, COMPLETION, body, origin="https://mine.example", **BEARER)
    assert (mine.status_code, mine.headers["access-control-allow-origin"]) == (200, "https://mine.example")
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, status in (("https://mine.example", 200), ("https://other.example", 400)):
        assert asked(app, COMPLETION, None, "OPTIONS", origin=origin, **asks).status_code == status


def test_the_body_has_a_limit() -> None:
    echo = Echo()
    gate = RequestGate(echo, NAME, Limits(9, body=100))

    async def streamed(size: int) -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(size):
            yield b"a"
        yield b'"}'

    fits = b'{"prompt": "a"}'.ljust(100)
    assert asked(gate, COMPLETION, fits).json() == {"prompt": "a"}
    assert asked(gate, COMPLETION, streamed(86)).status_code == 200
    refused = [asked(gate, COMPLETION, fits + b" "), asked(gate, COMPLETION, streamed(87))]
    refused += [asked(gate, COMPLETION, fits, **{"content-length": length}) for length in ("1" * 30, "-1", "x")]
    assert [answer.status_code for answer in refused] == [413] * 5
    assert "the limit is 100 bytes" in refused[0].text
    assert echo.calls == 2


def test_time_and_number_of_requests_have_limits() -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(COMPLETION, json={"prompt": "a"})

    async def run() -> None:
        wait = asyncio.Event()
        echo = Echo(wait)
        gate = RequestGate(echo, NAME, Limits(9, seconds=0.3, requests=2))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as client:
            answers = await asyncio.gather(*(ask(client) for _ in range(3)))
            assert [answer.status_code for answer in answers] == [504, 504, 429]
            assert "longer than 0.3 seconds" in answers[0].text
            assert answers[2].headers["retry-after"] == "1"
            assert echo.was_cancelled
            assert gate.running == 0
            wait.set()
            assert (await ask(client)).status_code == 200
            gate.is_closing = True
            assert (await ask(client)).status_code == 503

    asyncio.run(run())


def test_who_is_gone_is_not_computed_for() -> None:
    async def run() -> None:
        echo = Echo(asyncio.Event())
        gate = RequestGate(echo, NAME, Limits(9))
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"prompt": "a"}'}]

        async def receive() -> Any:
            return messages.pop()

        async def send(message: Any) -> None:
            pytest.fail(f"nobody is there for {message}")

        await gate({"type": "http", "path": COMPLETION, "method": "POST", "headers": []}, receive, send)
        assert (echo.calls, gate.running) == (1, 0)

    asyncio.run(run())


def test_an_answer_that_nobody_waits_for_stops_at_its_next_token() -> None:
    seen: list[Any] = []

    async def stock(model: Any, processor: Any, inputs: Any, config: Any, **more: Any) -> None:
        seen.append(inputs["stopping_criteria"][0])
        await asyncio.sleep(0.2)

    async def run() -> None:
        inputs, ids = {"input_ids": [1, 2]}, torch.ones(3, 5)
        config = SimpleNamespace(max_new_tokens=1024)
        given = MethodType(lambda _, *rest, **more: stock(*rest, **more), object())
        answer = asyncio.ensure_future(server._whole(given, POSITIONS, None, None, inputs, config, request_id="1"))
        await asyncio.sleep(0.05)
        assert config.max_new_tokens == POSITIONS - 2
        assert seen[0](ids, None).tolist() == [False] * 3
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        assert seen[0](ids, None).tolist() == [True] * 3

    asyncio.run(run())


def test_a_second_signal_ends_at_once() -> None:
    stock = SimpleNamespace(should_exit=False, force_exit=False, ended=0)

    class Stock:
        should_exit = force_exit = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.should_exit = True

        async def shutdown(self, sockets: Any = None) -> None:
            stock.ended += 1

    gate = RequestGate(Echo(), NAME, Limits(9))
    gate.running = 1
    running = server._ending(Stock, [gate])()

    async def run() -> None:
        running.handle_exit(signal.SIGTERM, None)
        ending = asyncio.ensure_future(running.shutdown())
        await asyncio.sleep(0.1)
        assert (gate.is_closing, stock.ended) == (True, 0)
        running.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(ending, 5)
        assert stock.ended == 1

    asyncio.run(run())
