"""The errors of the Hub's client: which to retry, how long to wait, and their remedies."""

import json
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from dtfcli.errors import DTFError, HubError, reason_of

# The base of all errors of a request: httpx before huggingface_hub 2, httpx2 since.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 60.0
_LONGEST_SILENCE = 2.0
"""Retries without any answer end early, so that the user soon knows that the network is down."""
PASSING = frozenset({429, 500, 502, 503, 504})


class HubAccessError(HubError):
    """The user may not do this on the Hub, or is not logged in."""

    exit_code = 2


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes; uploads wrap their errors."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _response(error: BaseException) -> Any:
    return next((r for link in _chain(error) if (r := getattr(link, "response", None)) is not None), None)


def status_of(error: BaseException) -> int | None:
    """The status of the Hub's answer; None without an answer."""
    response = _response(error)
    return None if response is None else response.status_code


def delay_before_next(error: BaseException, wait: float | None) -> float | None:
    """Seconds until the next try, as the Hub asks, at most a minute; None: give up."""
    retry_after = _retry_after(error)
    if status_of(error) is None and wait is not None and wait > _LONGEST_SILENCE:
        return None
    if wait is None or (retry_after is not None and retry_after > _LONGEST_WAIT):
        return None
    return wait if retry_after is None else retry_after


def _retry_after(error: BaseException) -> float | None:
    response = _response(error)
    text = "" if response is None else response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def reason(error: BaseException) -> str:
    """The Hub's answer in one word."""
    status = status_of(error)
    return str(status) if status is not None else f"nothing ({type(error).__name__})"


ODD_ANSWERS: tuple[type[Exception], ...] = (
    *(LookupError, TypeError, AttributeError, NameError, ArithmeticError, AssertionError, RecursionError),
)
"""What the Hub's client raises when an answer has another form than it expects; besides ValueError."""
NO_JSON: tuple[type[Exception], ...] = (*ODD_ANSWERS, json.JSONDecodeError)
ANY_TROUBLE: tuple[type[Exception], ...] = (HTTPError, OSError, RuntimeError, ValueError, *ODD_ANSWERS)
"""What calls raise that repeat their requests themselves."""


def odd_answer(error: BaseException, failed: str) -> HubError:
    """Something answered, but not as the Hub does: a proxy, a login page of a network, another server."""
    return HubError(
        f"{failed}: the answer is not the Hub's ({type(error).__name__}: {reason_of(error)}); check the network and "
        "HF_ENDPOINT, then push again."
    )


def explain(error: BaseException, failed: str, repo: str) -> DTFError:
    """An error with a remedy."""
    if isinstance(error, NO_JSON):
        return odd_answer(error, failed)
    status = status_of(error)
    said = getattr(error, "server_message", None)
    detail = f" ({' '.join(str(said).split())[:200]})" if said else ""
    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return HubError(f"{failed}: offline mode is on; unset HF_HUB_OFFLINE to push.")
    if status is None and isinstance(error, ValueError):
        return odd_answer(error, failed)
    if status is None:
        return HubError(
            f"{failed}: the Hub cannot be reached ({type(error).__name__}); check the network and try again."
        )
    if status == 401:
        return HubAccessError(f"{failed}: your token is not accepted (401); run `hf auth login` again.")
    if status == 403:
        where = f" to {repo}" if repo else ""
        return HubAccessError(
            f"{failed}: not allowed to write{where} (403){detail}; use a token with write access (`hf auth login`)."
        )
    if status in (409, 412):
        return HubError(
            f"{failed}: {repo} has changed since this push began ({status}), by somebody else or by a "
            "request whose answer got lost; push again."
        )
    if status == 429:
        after = _retry_after(error)
        when = f"in {after:.0f} s" if after else "in a few minutes"
        return HubError(f"{failed}: too many requests (429); push again {when}.")
    if status >= 500:
        return HubError(f"{failed}: the Hub failed ({status}); push again later.")
    return HubError(f"{failed}: the Hub answered {status}{detail}.")
