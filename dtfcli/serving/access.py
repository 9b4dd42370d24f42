"""Who may use a server: whoever knows its key; without one, this machine alone."""

import hmac
import json
import os
import re
import sys
from base64 import b64decode
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from dtfcli.errors import ConfigError
from dtfcli.settings.sources import API_KEY

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]


def require_access(host: str, key: str | None, no_api_key: bool) -> None:
    """Raise a ConfigError if strangers could come in, or if the key fits no header of HTTP."""
    key = os.environ.get(API_KEY) if key is None else key  # an empty one counts as none on the command line
    if key is not None and no_api_key:
        raise ConfigError(f"--no-api-key: there is a key, from --api-key or {API_KEY}; leave one of them out.")
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise ConfigError("--api-key: a key is letters, digits and signs of ASCII, without spaces; choose another.")
    if key is None and not no_api_key and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: other machines reach it, and there is no key. "
            f"Set one in {API_KEY}, or give --no-api-key to let everybody in, or listen on localhost."
        )


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def hide_key(key: str | None) -> None:
    """Start the process again with the key in its environment, if it is in the command line, which everybody can list.

    The rest of the command line and the number of the process stay. Windows cannot do that.
    """
    kept = without_key(sys.orig_argv)
    if key and kept != sys.orig_argv and os.name == "posix":
        os.execve(sys.executable, [sys.executable, *kept[1:]], os.environ | {API_KEY: key})


def without_key(arguments: Sequence[str]) -> list[str]:
    """A command line without --api-key and its value."""
    kept, rest = list[str](), iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*kept, argument, *rest]
        name, equals, _ = argument.partition("=")
        if name.replace("_", "-") != "--api-key":
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept


@dataclass(frozen=True)
class Access:
    """Who may ask a server: those who know the key, None for everybody; scripts of which web pages."""

    key: str | None = None
    origins: tuple[str, ...] = ()

    def around(self, app: App) -> App:
        """The app behind a gate; its health and the question of a browser whether it may ask need no key."""
        from starlette.middleware.cors import CORSMiddleware

        gate: Any = app if self.key is None else KeyGate(app, self.key, open_paths=("/health",))
        shared: Any = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        return CORSMiddleware(gate, allow_origins=self.origins, **shared) if self.origins else gate


EVERYBODY = Access()


class KeyGate:
    """ASGI: lets a request in if it brings the key, as `Authorization: Bearer KEY` or as the password of a browser."""

    def __init__(self, app: App, key: str, scheme: str = "Bearer", open_paths: Sequence[str] = ()) -> None:
        """`scheme` is Bearer or Basic, for which a browser asks by itself; `open_paths` need no key."""
        self.app, self.key, self.scheme, self.open_paths = app, key.encode(), scheme, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self.open_paths or self._knows_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            challenge = (b"www-authenticate", f'{self.scheme} realm="dtf"'.encode())
            await refuse(send, 401, "The key is missing or wrong.", challenge)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, secret = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() != self.scheme.lower().encode():
            return False
        secret = secret.strip()
        if self.scheme == "Basic":
            try:
                secret = b64decode(secret, validate=True).partition(b":")[2]
            except ValueError:
                return False
        return hmac.compare_digest(secret, self.key)


async def refuse(send: Send, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
    """Answer with an error as OpenAI's clients read it, and close the connection, since the body may be unread."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
    headers = (
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *headers,
    )
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
