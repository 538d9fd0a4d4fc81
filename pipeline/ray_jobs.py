"""Launches as jobs of a Ray cluster: they go on when the machine that submitted them goes away.

A job is ``python -m pipeline.job RUN --launch ID``; its code travels with it (shipping.py), and its
submission id is the launch's id. Whatever it needs is in the run folder before. Nothing of Ray is
asked about results: only whether the job lives, and for its log.
"""

from __future__ import annotations

import http.client
import logging
import os
import queue
import shlex
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import ResourceError, UsageError
from pipeline.launches import LaunchRecord, read_launch
from pipeline.shipping import runtime_env
from pipeline.store import Store

T = TypeVar("T")

KNOCK_SECONDS = 5.0  # for an address to accept a connection: chosen
ANSWER_SECONDS = 20.0  # for a cluster to answer a question: chosen
PENDING_SECONDS = 300.0  # Ray lets jobs that cannot start wait for ever: chosen
SLOTS_SECONDS = 120.0  # how long a submitter watches a job that plans: chosen
# `ray job stop` gives a job that long to let its units finish, instead of three seconds.
STOP_WAIT_SECONDS = "60"
UNKNOWN = "UNKNOWN"  # a job that the cluster has never had: another cluster, or restarted
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray prefers them to what we say


class Jobs(NamedTuple):
    """The job server of a cluster, and its HTTP address."""

    client: Any
    dashboard: str


class JobState(NamedTuple):
    """What Ray says of a job."""

    status: str
    message: str
    exit_code: int | None

    @property
    def has_ended(self) -> bool:
        """Whether it will never run again."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED", UNKNOWN)


def connect(address: str) -> Jobs:
    """The job server at an address: ``http://head:8265``, or a head's ``host:6379``.

    Raises:
        UsageError: The address cannot be one.
        ResourceError: Nothing answers there within half a minute, or it wants a token.
    """
    if address in ("local", "inline") or address.startswith("ray://"):
        raise UsageError(
            f"jobs are submitted to a running cluster, found {address!r}: give the address of its "
            "dashboard, as in --on http://head:8265, or of its head, as in --on head:6379"
        )
    from ray.exceptions import AuthenticationError

    try:
        dashboard = _dashboard(address)
        _knock(dashboard)
        return Jobs(_within(ANSWER_SECONDS, lambda: _client(dashboard)), dashboard)
    except AuthenticationError as error:
        raise ResourceError(
            f"the cluster at {address} wants a token. Set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to its token here too"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"no job server of Ray answers at {address} ({_first_line(error)}). Expected the "
            "dashboard of a running cluster, as http://head:8265. By default it listens on the "
            "head's loopback only: `ssh -N -L 8265:localhost:8265 head`, then --on "
            "http://localhost:8265"
        ) from error


def submit(jobs: Jobs, store: Store, launch_id: str, *options: str) -> None:
    """Submit a launch of the run in a store. Raises ResourceError if the cluster refuses it."""
    words = ["python", "-m", "pipeline.job", store.uri, "--launch", launch_id, *options]
    submit_command(jobs, words, launch_id)


def submit_command(jobs: Jobs, words: list[str], submission_id: str) -> None:
    """Submit a command that runs with this code. Raises ResourceError if the cluster refuses."""
    environment = runtime_env()
    environment["env_vars"] = {
        **environment["env_vars"], "RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_SECONDS,
    }  # fmt: skip
    try:
        jobs.client.submit_job(
            entrypoint=shlex.join(words), submission_id=submission_id, runtime_env=environment
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"the cluster at {jobs.dashboard} did not take the job: {_first_line(error)}"
        ) from error


def job_state(jobs: Jobs, submission_id: str) -> JobState | None:
    """What became of a job; None if the cluster does not answer now."""
    try:
        info = jobs.client.get_job_info(submission_id)
    except OSError:
        return None
    except RuntimeError as error:
        return JobState(UNKNOWN, "", None) if "status code 404" in str(error) else None
    return JobState(str(info.status), info.message or "", info.driver_exit_code)


def job_log(jobs: Jobs, submission_id: str) -> str | None:
    """What a job has printed; None if the cluster does not know it, or does not answer now."""
    try:
        return jobs.client.get_job_logs(submission_id)
    except (OSError, RuntimeError):
        return None


def stop_job(jobs: Jobs, submission_id: str) -> bool:
    """Have Ray end a job's process. Returns whether it was asked."""
    try:
        return bool(jobs.client.stop_job(submission_id))
    except (OSError, RuntimeError):
        return False


def await_start(jobs: Jobs, store: Store, launch_id: str) -> LaunchRecord | None:
    """Wait until a submitted launch has slots or has ended; its record, None if it has none yet.

    Raises:
        ResourceError: It cannot start, or ended before it began; with the reason.
    """
    began, deadline = time.monotonic(), None
    while True:
        state, record = job_state(jobs, launch_id), read_launch(store, launch_id)
        if record is not None and record.state == "failed":
            raise ResourceError(
                f"launch {launch_id} has failed on {record.host}: {record.message or 'see its log'}"
            )
        if record is not None and (record.num_slots or record.state in ("done", "interrupted")):
            return record
        if state is not None and state.has_ended:
            raise ResourceError(
                f"the job {launch_id} ended before it began ({state.status}): "
                + log_end(job_log(jobs, launch_id))
            )
        if state is not None and state.status == "RUNNING" and deadline is None:
            deadline = time.monotonic() + SLOTS_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            return record
        if deadline is None and time.monotonic() - began > PENDING_SECONDS:
            stop_job(jobs, launch_id)
            message = state.message if state is not None else "the cluster does not answer"
            raise ResourceError(
                f"the job {launch_id} did not start within {PENDING_SECONDS:g} s ({message}); it "
                "was withdrawn. See `ray status` on the cluster"
            )
        time.sleep(1.0)


def log_end(log: str | None) -> str:
    """The end of the log of a job that failed, for a message."""
    lines = (log or "it has left no log").strip().splitlines()
    if any("python: not found" in line or "python: command not found" in line for line in lines):
        return (
            "there is no `python` on its PATH. Start Ray on the nodes from the activated "
            "environment that has flatcensus's dependencies"
        )
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return named[-1] if named else "\n".join(lines[-20:])


def _dashboard(address: str) -> str:
    """The HTTP address of a cluster's dashboard, which the head knows."""
    if address.startswith(("http://", "https://")):
        return address.rstrip("/")
    if "://" in address:
        raise UsageError(f"expected http://head:8265 or head:6379, found {address!r}")
    _knock(f"http://{address}")
    if _speaks_http(address):
        return f"http://{address}"
    from ray.dashboard.utils import get_address_for_submission_client

    with _without_overrides():
        return _within(ANSWER_SECONDS, lambda: get_address_for_submission_client(address))


def _client(dashboard: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _without_overrides():
        return JobSubmissionClient(dashboard)


def _speaks_http(address: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{address}/api/version", timeout=KNOCK_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # it wants a token, for one
    except (OSError, ValueError, http.client.HTTPException):  # the last: it speaks something else
        return False
    return True


def _knock(url: str) -> None:
    """Raise OSError if nothing listens there."""
    parts = urlsplit(url)
    if parts.hostname is None:
        raise ValueError(f"{url!r} names no host")
    port = parts.port or {"https": 443}.get(parts.scheme, 80)
    socket.create_connection((parts.hostname, port), timeout=KNOCK_SECONDS).close()


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises; TimeoutError after some seconds, where Ray takes minutes."""
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        worked, answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if worked:
        return answer
    raise answer


@contextmanager
def _without_overrides() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
