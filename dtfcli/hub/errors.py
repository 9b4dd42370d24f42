"""What the Hub's client raises: which troubles pass, how long to wait for that, and what to tell the user."""

from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from dtfcli.errors import DTFError, HubError

# httpx before huggingface_hub 2, httpx2 since: the base of what a request can raise, refusals and broken connections.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 60.0
_LONGEST_SILENCE = 2.0
"""A network that is down is told soon."""
PASSING = frozenset({429, 500, 502, 503, 504})
NOT_DONE = frozenset({429, 503})
"""Answers after which the request certainly had no effect."""


class HubAccessError(HubError):
    """The user may not do this on the Hub, or is not logged in."""

    exit_code = 2


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it; uploads wrap their troubles."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _response(error: BaseException) -> Any:
    return next((r for link in _chain(error) if (r := getattr(link, "response", None)) is not None), None)


def status_of(error: BaseException) -> int | None:
    """The Hub's answer; None when there was none."""
    response = _response(error)
    return None if response is None else response.status_code


def delay_before_next(error: BaseException, wait: float | None) -> float | None:
    """Seconds until the next try: what the Hub asks for, at most a minute; None: give up."""
    asked = _retry_after(error)
    if status_of(error) is None and wait is not None and wait > _LONGEST_SILENCE:
        return None
    if wait is None or (asked is not None and asked > _LONGEST_WAIT):
        return None
    return wait if asked is None else asked


def _retry_after(error: BaseException) -> float | None:
    response = _response(error)
    text = "" if response is None else response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def reason(error: BaseException) -> str:
    """The Hub's answer in a word."""
    status = status_of(error)
    return str(status) if status is not None else f"nothing ({type(error).__name__})"


def explain(error: BaseException, failed: str, repo: str) -> DTFError:
    """What went wrong and the remedy."""
    status = status_of(error)
    said = getattr(error, "server_message", None)
    detail = f" ({' '.join(str(said).split())[:200]})" if said else ""
    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return HubError(f"{failed}: offline mode is on; unset HF_HUB_OFFLINE to push.")
    if status is None and isinstance(error, ValueError):
        return HubError(f"{failed}: {next(iter(str(error).splitlines()), '')}")
    if status is None:
        return HubError(
            f"{failed}: the Hub cannot be reached ({type(error).__name__}); check the network and try again."
        )
    if status == 401:
        return HubAccessError(f"{failed}: your token is not accepted (401); run `hf auth login` again.")
    if status == 403:
        where = f" to {repo}" if repo else ""
        return HubAccessError(
            f"{failed}: no right to write{where} (403){detail}; take a token with write access (`hf auth login`)."
        )
    if status in (409, 412):
        return HubError(f"{failed}: {repo} was changed or created by somebody else meanwhile ({status}); push again.")
    if status == 429:
        after = _retry_after(error)
        when = f"in {after:.0f} s" if after else "in a few minutes"
        return HubError(f"{failed}: too many requests (429); push again {when}.")
    if status >= 500:
        return HubError(f"{failed}: the Hub has trouble ({status}); push again later.")
    return HubError(f"{failed}: the Hub answered {status}{detail}.")
