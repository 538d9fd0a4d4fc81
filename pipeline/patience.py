"""Calls to the hub, repeated while that can help, and its errors in our words.

Rate limits, server errors and broken connections are tried again after an exponentially growing
pause with jitter, or after the pause that the server announces. Everything else ends at once in a
``HubError`` that says what to do. Messages are our own, and their causes are cut off: what the
server or the HTTP library says reaches neither the user nor a failure row, so a token cannot
either.
"""

from __future__ import annotations

import errno
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.errors import HubError, StoreError

TRIES = 6
FIRST_PAUSE_SECONDS = 1.0  # doubles; with jitter 6 tries take 15-31 s besides the calls
LONGEST_PAUSE_SECONDS = 300.0  # the hub's rate-limit window is five minutes
FAILURES_IN_A_ROW = 3  # names or files that get no answer before the others are not tried: chosen
RETRIED_STATUS = frozenset((408, 429, 500, 502, 503, 504))
# The hub's header, as in '"api";r=0;t=55': no request is left, and the window ends in 55 s.
RATE_LIMIT = re.compile(r"\br=0\s*;\s*t=(\d+)")
TOKEN_HINT = (
    "Accept its terms on the hub if it has any, then set HF_TOKEN to a token with read access."
)

# HfHubHTTPError derives from the base of its HTTP library's errors: requests before
# huggingface_hub 1.0, httpx since. Naming the base this way needs neither.
_HTTP_ERRORS = tuple(base for base in HfHubHTTPError.__mro__[1:] if issubclass(base, Exception))[:1]

T = TypeVar("T")


class Circuit:
    """Whether it makes sense to go on asking: closed until several calls in a row got no answer.

    ``broken``: nobody answered before, so that not one more call is tried. ``host``: who is asked,
    if not the hub.
    """

    def __init__(self, *, broken: bool = False, host: str | None = None) -> None:
        self.failures = FAILURES_IN_A_ROW if broken else 0
        self.host = host

    def call(self, ask: Callable[[], T], *, what: str) -> T:
        """Ask, unless nobody answers any more.

        Raises:
            HubError: What ``ask`` raised, or that it was not tried.
        """
        if self.failures >= FAILURES_IN_A_ROW:
            raise HubError(
                f"{what}: not tried, because {self.host or constants.ENDPOINT} did not answer for "
                "others before",
                unasked=True,
            )
        try:
            result = ask()
        except HubError as error:
            waited = error.unasked and not constants.HF_HUB_OFFLINE
            self.failures = self.failures + 1 if waited else 0
            raise
        self.failures = 0
        return result


def patiently(call: Callable[[], T], *, what: str, host: str | None = None) -> T:
    """Call the hub, several times if it is busy or unreachable for a moment.

    Args:
        call: Makes the requests.
        what: What is asked for, e.g. ``timm/vit_base_patch16_224.augreg_in21k``; for messages.
        host: Who is asked, if not the hub.

    Raises:
        HubError: If the answer is final, or the last try failed.
        StoreError: If the disk of the cache is full.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except HFValidationError:
            raise HubError(
                f"{what}: expected a repository's name, as owner/name. Correct it."
            ) from None
        except json.JSONDecodeError:  # a proxy's page of its own, for one
            raise HubError(
                f"{what}: {host or constants.ENDPOINT} answered with something else than the "
                "hub's records. Check HF_ENDPOINT, proxies and whether the network wants a login."
            ) from None
        # RuntimeError: how the Xet client reports a failed transfer.
        except (*_HTTP_ERRORS, EntryNotFoundError, OSError, RuntimeError) as error:
            cause = _cause(error)
            pause = _pause(cause, attempt, what, host or constants.ENDPOINT)
            if attempt == TRIES:
                raise _exhausted(cause, what, host or constants.ENDPOINT) from None
        time.sleep(pause)
    raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception:
    """The failed request behind "not in the cache either", which is how downloads report it."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _pause(error: Exception, attempt: int, what: str, host: str) -> float:
    """Seconds to wait before the next try; raises HubError where no try can help."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        raise HubError(
            f"{what}: not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set. "
            "Unset it, or fill the cache on a machine with network.",
            unasked=True,
        ) from None
    if isinstance(error, GatedRepoError) or status == 403:
        raise HubError(f"{what}: the hub refuses access (gated or private). {TOKEN_HINT}") from None
    if isinstance(error, RevisionNotFoundError):
        raise HubError(
            f"{what}: no such revision. Correct 'revision', or leave it out to take the newest."
        ) from None
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        raise HubError(f"{what}: the hub does not accept the login. {TOKEN_HINT}") from None
    if isinstance(error, RepositoryNotFoundError):
        raise HubError(
            f"{what}: no such repository at {host}, or a private one. "
            f"Check the name and HF_ENDPOINT. {TOKEN_HINT}"
        ) from None
    if status == 404 or isinstance(error, EntryNotFoundError):
        raise HubError(f"{what}: not found at {host}. Check the name.") from None
    if status is not None and status not in RETRIED_STATUS:
        raise HubError(
            f"{what}: {host} answered with HTTP status {status}. Check HF_ENDPOINT and proxies."
        ) from None
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        raise StoreError(
            f"{what}: no space is left for it in the cache {constants.HF_HUB_CACHE}. Free some, or "
            "set HF_HOME to a folder on a larger disk; what is complete is kept.",
            disk_full=True,
        ) from None
    if getattr(error, "errno", None) is not None and not isinstance(
        error, ConnectionError | TimeoutError
    ):
        raise HubError(
            f"{what}: cannot write to the cache {constants.HF_HUB_CACHE} ({error}). Free space or "
            "correct its permissions, or set HF_HOME to another folder."
        ) from None
    announced = None if response is None else _announced(response.headers)
    if announced is not None and announced > LONGEST_PAUSE_SECONDS:
        raise HubError(
            f"{what}: the hub asks to wait {announced:.0f} s (HTTP status {status}). "
            "Try again after that, or set HF_TOKEN for a higher limit.",
            unasked=True,  # as silent for the others: a launch stops, no unit fails for it
        ) from None
    # Jitter keeps many machines from returning at the same moment; it has no effect on results.
    backoff = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1)
    return max(announced or 0.0, min(backoff, LONGEST_PAUSE_SECONDS))


def _announced(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: Retry-After in either form, or a rate-limit header."""
    value = headers.get("retry-after")
    if value is None:
        limit = RATE_LIMIT.search(headers.get("ratelimit", ""))
        return float(limit[1]) if limit else None
    if value.strip().isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:  # HTTP dates are UTC, also where a server forgets to say so
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _exhausted(error: Exception, what: str, host: str) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return HubError(
            f"{what}: the hub still answers with HTTP status {status} after {TRIES} tries. "
            "Try again later: finished work is kept.",
            unasked=True,
        )
    return HubError(
        f"{what}: cannot reach {host} after {TRIES} tries "
        f"({type(error).__name__}). Check the network, HF_ENDPOINT and proxy settings; with a "
        "filled cache, HF_HUB_OFFLINE=1 works without network.",
        unasked=True,
    )
