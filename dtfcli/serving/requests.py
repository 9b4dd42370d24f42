"""What a server answers: text for the one model, within limits. No request names another model, a file or code.

Requests go through one list of fields; whatever stands on no list is refused before the server of Transformers sees it.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from dtfcli.serving.access import App, Receive, Scope, Send, refuse

_TEXT, _COUNT, _NUMBER, _FLAG, _LIST, _OBJECT = (str,), (int,), (int, float), (bool,), (list,), (dict,)
_EVERY = {"model": _TEXT, "stream": _FLAG, "temperature": _NUMBER, "top_p": _NUMBER, "seed": _COUNT, "user": _TEXT}
_EVERY |= {"stream_options": _OBJECT}
_SAMPLED = {"max_tokens": _COUNT, "frequency_penalty": _NUMBER, "presence_penalty": _NUMBER, "stop": (str, list)}
_SAMPLED |= {"n": _COUNT}
_CHAT = {"tools": _LIST, "tool_choice": (str, dict), "parallel_tool_calls": _FLAG, "metadata": _OBJECT, "store": _FLAG}
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "/v1/chat/completions": _EVERY
    | _SAMPLED
    | _CHAT
    | {"messages": _LIST, "max_completion_tokens": _COUNT, "logit_bias": _OBJECT, "chat_template_kwargs": _OBJECT}
    | {"logprobs": _FLAG, "top_logprobs": _COUNT},
    "/v1/completions": _EVERY
    | _SAMPLED
    | {"prompt": _TEXT, "suffix": _TEXT, "best_of": _COUNT, "echo": _FLAG, "logprobs": _COUNT},
    "/v1/responses": _EVERY | _CHAT | {"input": (str, list), "instructions": _TEXT, "max_output_tokens": _COUNT},
}
"""By endpoint: the fields of a request and their types in JSON."""
_STOPS, _STOP = 16, 200
_READ_ONLY = ("/health", "/v1/models")
_KINDS = {"text", "input_text", "output_text", "reasoning_text", "message", "reasoning", "function"}
_KINDS |= {"function_call", "function_call_output"}
_PARTS = {"type", "role", "content", "text", "name", "id", "status", "index", "refusal", "reasoning_content", "summary"}
_PARTS |= {"tool_calls", "tool_call_id", "call_id", "function", "arguments", "output", "annotations", "logprobs"}


@dataclass(frozen=True)
class Limits:
    """Of one request; `requests` of all that are computed or wait at once."""

    tokens: int
    body: int = 2**20
    seconds: float = 600.0
    requests: int = 64


class RefusedError(Exception):
    """A request that is not answered: the status of HTTP and the reason."""


class _Sent:
    """What the client was sent of an answer."""

    def __init__(self, send: Send) -> None:
        self.send, self.is_begun, self.is_complete = send, False, False

    async def __call__(self, message: dict[str, Any]) -> None:
        self.is_begun = True
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self.send(message)


class RequestGate:
    """ASGI: passes on requests of which the server reads nothing but text and numbers, as many as the limits allow."""

    def __init__(self, app: App, model: str, limits: Limits, origins: Sequence[str] = ()) -> None:
        """`model` is the name that requests may give; `origins` are the web pages whose scripts may ask."""
        self.app, self.model, self.limits, self.origins = app, model, limits, origins
        self.running, self.is_closing = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            sent = _Sent(send)
            try:
                await self._let_in(scope, receive, sent)
            except RefusedError as error:
                again = [(b"retry-after", b"1")] if error.args[0] in (429, 503) else []
                if not sent.is_begun:  # else the connection ends without the answer's end, and the client sees that
                    await refuse(send, *error.args, *again)

    async def _let_in(self, scope: Scope, receive: Receive, send: "_Sent") -> None:
        path, method, headers = scope["path"], scope["method"], dict(scope["headers"])
        if self.is_closing:
            raise RefusedError(503, "The server is shutting down.")
        if path in _READ_ONLY and method == "GET":
            await self.app(scope, receive, send)
            return
        if path not in FIELDS or method != "POST":
            raise RefusedError(404, f"{method} {path[:100]}: no such endpoint.")
        if (origin := headers.get(b"origin", b"").decode("latin-1")) and origin not in self.origins:
            raise RefusedError(403, f"Origin {origin[:100]}: pages of this address may not ask; see --cors-origin.")
        if self.running >= self.limits.requests:
            raise RefusedError(429, f"{self.running} requests are computed or wait; the limit is reached. Try later.")
        self.running += 1
        try:
            # A client that chose its request's id could choose another's.
            scope = scope | {"headers": [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]}
            async with asyncio.timeout(self.limits.seconds) as time:
                await self._answer(scope, receive, send)
        except TimeoutError:
            if time.expired():
                raise RefusedError(504, f"The answer took longer than {self.limits.seconds:g} seconds.") from None
            raise
        finally:
            self.running -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: "_Sent") -> None:
        body = json.dumps(self._checked(scope["path"], await self._read(scope, receive))).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.shield(gone)

        gone = asyncio.ensure_future(receive())  # after the body nothing comes but the end of the connection
        work = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or send.is_complete:
                await work
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit, body = self.limits.body, b""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = not length.isdigit() or len(length) > 18 or int(length) > limit
        while not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "The body has no end.")
            body += message.get("body", b"")
            too_large = len(body) > limit
            if not message.get("more_body", False):
                break
        if too_large:
            raise RefusedError(413, f"The body is too large; the limit is {limit} bytes.")
        return body

    def _checked(self, path: str, text: bytes) -> dict[str, Any]:
        """The fields of a request, of which each is on the list."""
        try:
            fields = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, "The body is not JSON.") from error
        if not isinstance(fields, dict):
            raise RefusedError(400, "The body is no JSON object.")
        known = FIELDS[path]
        for name, value in fields.items():
            if name not in known:
                raise RefusedError(400, f"{name[:100]}: no field of {path} here; leave it out.")
            if value is not None and type(value) not in known[name]:
                raise RefusedError(400, f"{name}: should be {' or '.join(kind.__name__ for kind in known[name])}.")
            if name.startswith("max_") and value is not None and not 1 <= value <= self.limits.tokens:
                raise RefusedError(
                    400, f"{name} = {value}: should be 1 to {self.limits.tokens}, the model's positions."
                )
        for name in {"messages", "input"} & known.keys():
            if fields.get(name) is None:
                raise RefusedError(400, f"{name}: is missing.")
            _only_text(fields[name], name)
        if (model := fields.get("model")) not in (None, self.model):
            raise RefusedError(400, f"model = {model[:100]!r}: this server has one model, {self.model!r}.")
        stops = fields.get("stop") or ()
        stops = [stops] if isinstance(stops, str) else stops
        if len(stops) > _STOPS or any(type(stop) is not str or len(stop) > _STOP for stop in stops):
            raise RefusedError(400, f"stop: at most {_STOPS} texts of at most {_STOP} characters.")
        if any(type(tool) is not dict or tool.get("type") != "function" for tool in fields.get("tools") or ()):
            raise RefusedError(400, "tools: each should be an object of the type 'function'.")
        for name, value in (fields.get("chat_template_kwargs") or {}).items():
            if name != "enable_thinking" or type(value) is not bool:
                raise RefusedError(400, f"chat_template_kwargs.{name[:100]}: only enable_thinking, true or false.")
        return fields


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _only_text(value: Any, place: str) -> None:
    """Refuse what a chat names and does not say itself: pictures, sounds and files, by address or by content."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            _only_text(item, f"{place}[{number}]")
    elif isinstance(value, dict):
        kind = value.get("type")
        if kind is not None and str(kind) not in _KINDS:
            raise RefusedError(400, f"{place}.type = {str(kind)[:100]!r}: this server reads text alone.")
        for name, item in value.items():
            if name not in _PARTS:
                raise RefusedError(400, f"{place}.{name[:100]}: no such part; this server reads text alone.")
            if name != "arguments":
                _only_text(item, f"{place}.{name}")
