"""Requests to an S3 bucket: clients, time limits, repetition, and errors in words.

Credentials, region and endpoint come from the environment (``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, or the
machine's role) and stay there: no message, log or file repeats them. obstore's own repetition is
off, because whoever repeats a conditional write must know that it was repeated.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from pipeline.errors import StoreError
from pipeline.store import MissingKeyError

T = TypeVar("T")

PATIENCE = "FLATCENSUS_S3_PATIENCE_SECONDS"
PATIENCE_SECONDS = 120.0  # of repeating one request: an outage that need not end a launch
STALL_SECONDS = 20.0  # without a byte, or for a small upload as a whole
UPLOAD_BYTES_PER_SECOND = 2**19  # slower uploads are taken for stalled
PAUSE_SECONDS = (0.1, 10.0)  # first and longest pause between two tries

_DAY = 86400.0
_REQUEST_ERRORS = (BaseError, FileNotFoundError)  # obstore reports 404 as the latter
_OTHER_TRY = frozenset({"RequestTimeout", "SlowDown", "OperationAborted"})  # reported as 4xx too
_FULL = re.compile("StorageFull|QuotaExceeded|InsufficientStorage")
_log = logging.getLogger(__name__)


class UnsettledError(Exception):
    """A request that must be repeated although the server refused it or answered it."""


@dataclass(frozen=True)
class Bucket:
    """A bucket by its name; where it is, the environment says."""

    name: str

    @property
    def endpoint(self) -> str:
        """The server, without credentials that its address may hold."""
        address = _endpoint()
        if address is None:
            return f"AWS ({os.environ.get('AWS_REGION') or 'default region'})"
        parts = urlsplit(address)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def reader(self) -> S3Store:
        """A client for everything but uploads: no limit of time as long as bytes arrive."""
        return _client(self.name, _DAY, STALL_SECONDS, os.getpid(), _endpoint())

    def writer(self, size: int) -> S3Store:
        """A client for uploads of ``size`` bytes."""
        limit = STALL_SECONDS
        while limit < STALL_SECONDS + size / UPLOAD_BYTES_PER_SECOND:
            limit *= 2  # few different clients, whatever the sizes are
        return _client(self.name, limit, limit, os.getpid(), _endpoint())


def repeated(bucket: Bucket, action: str, key: str, request: Callable[[], T]) -> T:
    """Carry out a request, again while the server or the network fails, up to PATIENCE_SECONDS.

    Args:
        bucket: Where.
        action: What, for messages: ``"read"``.
        key: The object's whole name in the bucket.
        request: Raises what obstore raises, or UnsettledError.

    Raises:
        MissingKeyError: There is no such object.
        StoreError: Anything else that another try would not mend, or patience is at an end.
    """
    started, tries = time.monotonic(), 0
    patience = float(os.environ.get(PATIENCE) or PATIENCE_SECONDS)
    while True:
        try:
            return request()
        except (*_REQUEST_ERRORS, UnsettledError) as error:
            failure = error
        first, longest = PAUSE_SECONDS
        pause = min(longest, first * 2.0 ** min(tries, 20)) * random.uniform(0.5, 1.0)
        late = time.monotonic() - started + pause > patience
        if not _may_pass(failure) or late:
            # Not chained: a server's answer may quote the request, access key included.
            raise _explained(bucket, action, key, failure, tries + 1) from None
        tries += 1
        _log.info("%s s3://%s/%s: %s; again", action, bucket.name, key, _cause(failure))
        time.sleep(pause)


@lru_cache(maxsize=32)
def _client(name: str, seconds: float, stall: float, pid: int, endpoint: str | None) -> S3Store:
    """One client per limit and process: a forked child must not share its parent's connections."""
    parts = urlsplit(endpoint or "https://aws")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StoreError(
            f"cannot use s3://{name}: AWS_ENDPOINT_URL is {_clean(str(endpoint))!r}, expected an "
            "address such as https://s3.example.org. Correct it, or unset it for AWS."
        )
    try:
        return S3Store(
            name,
            client_options={
                "timeout": timedelta(seconds=seconds),
                "read_timeout": timedelta(seconds=stall),
                "allow_http": parts.scheme == "http",
            },
            retry_config={"max_retries": 0},
        )
    except (BaseError, ValueError) as error:
        raise StoreError(
            f"cannot use s3://{name}: {_clean(str(error))}. Check the name, AWS_REGION and "
            "AWS_ENDPOINT_URL. Then run the same command again."
        ) from None


def _endpoint() -> str | None:
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if address := os.environ.get(variable):
            return address
    return None


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed."""
    if isinstance(error, UnsettledError):
        return True
    if isinstance(error, (FileNotFoundError, PermissionDeniedError, UnauthenticatedError)):
        return False
    status, code = _status(error), _code(error)
    if code in _OTHER_TRY:
        return True
    if _no_credentials(error) or _FULL.search(code):
        return False
    return status is None or status >= 500 or status in (408, 409, 429)


def _explained(bucket: Bucket, action: str, key: str, error: Exception, tries: int) -> StoreError:
    """The StoreError for what a request ended with."""
    status, code = _status(error), _code(error)
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        return MissingKeyError(_sentence(bucket, action, key, "there is no such object"))
    if code == "NoSuchBucket":
        reason = (
            "there is no such bucket. Create it, or correct its name, AWS_REGION or "
            "AWS_ENDPOINT_URL"
        )
    elif _no_credentials(error):
        reason = "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif code == "RequestTimeTooSkewed":
        reason = "this machine's clock is wrong. Set it"
    elif isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or status == 400:
        reason = (
            f"refused ({_cause(error)}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_SESSION_TOKEN and AWS_REGION, and that they may list, read, write and delete there"
        )
    elif _FULL.search(code):
        reason = f"the store is full ({_cause(error)}). Free some space"
    elif _may_pass(error):
        reason = (
            f"no success (attempts: {tries}, the last: {_cause(error)}). Check the network, "
            "AWS_ENDPOINT_URL and the server"
        )
    else:
        reason = f"{_cause(error)}. Check the bucket, AWS_REGION and AWS_ENDPOINT_URL"
    return StoreError(_sentence(bucket, action, key, reason), disk_full=bool(_FULL.search(code)))


def _sentence(bucket: Bucket, action: str, key: str, reason: str) -> str:
    place = f"s3://{bucket.name}/{key} at {bucket.endpoint}"
    return f"cannot {action} {place}: {reason}. Then run the same command again."


def _cause(error: Exception) -> str:
    """One line of what the server or the network said, without what it quotes of the request."""
    if isinstance(error, UnsettledError):
        return str(error)
    status, code = _status(error), _code(error)
    message = re.search(r"<Message>([^<]{1,200})", str(error))
    if status is not None:
        parts = [f"HTTP {status}", code, message[1] if message else ""]
        return _clean(", ".join(part for part in parts if part))
    first = str(error).partition("\n")[0]
    return _clean(first.rpartition(" - ")[2][:200])


def _status(error: Exception) -> int | None:
    found = re.search(r"non-2xx status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def _code(error: Exception) -> str:
    found = re.search(r"<Code>(\w{1,60})</Code>", str(error))
    return found[1] if found else ""


def _no_credentials(error: Exception) -> bool:
    """Whether obstore looked for a machine's role and there was none: no keys are set."""
    return "169.254.169.254" in str(error) or "latest/api/token" in str(error)


def _clean(text: str) -> str:
    """Text without the values of credentials, whoever may have put them there."""
    for variable in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if value := os.environ.get(variable):
            text = text.replace(value, f"${variable}")
    return re.sub(r"//[^/@\s]+@", "//", text)
