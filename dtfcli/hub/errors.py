"""Errors of a conversation with the Hub: when to try again, and each error in words, with its remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from dtfcli.errors import DTFError, HubError, reason_of

# The base of all errors of a request: httpx before huggingface_hub 2, httpx2 since.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 60.0
_LONGEST_SILENCE = 2.0
"""Retries without any answer end early, so that the user soon knows that the network is down."""
_PASSING = frozenset({429, 500, 502, 503, 504})


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


def _retry_after(error: BaseException) -> float | None:
    response = _response(error)
    text = "" if response is None else response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def delay_before_next(error: BaseException, wait: float) -> float | None:
    """Seconds until the next try: as the Hub asks, else `wait`. None: it would not help, or take over a minute."""
    status, retry_after = status_of(error), _retry_after(error)
    if status is None:
        return wait if wait <= _LONGEST_SILENCE and not isinstance(error, OfflineModeIsEnabled) else None
    if status not in _PASSING or (retry_after is not None and retry_after > _LONGEST_WAIT):
        return None
    return wait if retry_after is None else retry_after


@contextmanager
def explained(failed: str, repo: str = "") -> Iterator[None]:
    """Raise every error of a `with` block as one with a remedy.

    Args:
        failed: begins the message: which step failed.
        repo: that the step writes to.
    """
    try:
        yield
    except DTFError:
        raise
    except Exception as error:  # an answer in another form than the Hub's raises anything in its client
        raise _explain(error, failed, repo) from error


def _explain(error: Exception, failed: str, repo: str) -> HubError:
    status, links = status_of(error), list(_chain(error))
    if status == 401:
        return HubAccessError(f"{failed}: your token is not accepted (401); run `hf auth login` again.")
    if status == 403:
        where = f" to {repo}" if repo else ""
        return HubAccessError(
            f"{failed}: not allowed to write{where} (403){_detail(error)}; use a token with write access "
            "(`hf auth login`)."
        )
    if any(isinstance(link, OfflineModeIsEnabled) for link in links):
        text = "offline mode is on; unset HF_HUB_OFFLINE to push"
    elif status is None and any(isinstance(link, (HTTPError, OSError)) for link in links):
        text = f"the Hub cannot be reached ({type(error).__name__}); check the network and try again"
    elif status is None:  # something answered, but not as the Hub does: a proxy, a login page, another server
        text = (
            f"the answer is not the Hub's ({type(error).__name__}: {reason_of(error)}); check the network and "
            "HF_ENDPOINT, then push again"
        )
    elif status in (409, 412):
        text = (
            f"{repo} has changed since this push began ({status}), by somebody else or by a request whose answer got "
            "lost; push again"
        )
    elif status == 429:
        after = _retry_after(error)
        text = f"too many requests (429); push again {f'in {after:.0f} s' if after else 'in a few minutes'}"
    elif status >= 500:
        text = f"the Hub failed ({status}); push again later"
    else:
        text = f"the Hub answered {status}{_detail(error)}"
    return HubError(f"{failed}: {text}.")


def _detail(error: BaseException) -> str:
    """The Hub's own words in brackets."""
    said = getattr(error, "server_message", None)
    return f" ({' '.join(str(said).split())[:200]})" if said else ""
