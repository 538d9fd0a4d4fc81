"""Launches: who works on a run, since when, how far, and how to ask it to stop.

Each launch keeps one small object in the run folder, ``launches/<id>.json``, rewritten every few
seconds while it lives. Nothing is decided by it, for what is done is asked of the shards alone; it
is there for people and for ``status``, ``logs`` and ``stop``, which need no cluster. A request to
stop is an object too, ``launches/<id>.stop``, so it reaches a launch wherever that runs.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import pydantic

from pipeline.errors import StoreError
from pipeline.store import MissingKeyError, Store

FOLDER = "launches"
BEAT_SECONDS = 5.0  # between two signs of life: chosen
SILENT_SECONDS = 60.0  # without a sign of life a launch is taken for dead: chosen
_log = logging.getLogger(__name__)

State = Literal["submitted", "running", "done", "interrupted", "failed"]
How = Literal["drain", "now"]


class LaunchRecord(pydantic.BaseModel):
    """One launch as it last said. Times are UTC in ISO 8601.

    ``on`` is the executor's name or the cluster's address; ``job`` is what a detached launch needs
    to be found on its cluster. Counts are of units: ``committed`` new results, ``failed`` given
    up, ``retried`` after a failure of their own, ``lost`` with their slot or node, ``duplicates``
    finished after another attempt had committed, ``speculated`` second attempts at slow ones,
    ``remaining`` known to be still to do.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    id: str
    on: str
    host: str
    pid: int
    started_at: str
    heartbeat_at: str
    state: State = "running"
    num_slots: int = 0
    committed: int = 0
    failed: int = 0
    retried: int = 0
    lost: int = 0
    duplicates: int = 0
    speculated: int = 0
    remaining: int = 0
    message: str = ""
    job: dict[str, str] | None = None

    @property
    def silent_seconds(self) -> float:
        """Age of the last sign of life by this machine's clock."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.heartbeat_at)).total_seconds()

    @property
    def is_alive(self) -> bool:
        """Whether it says that it runs, and said so lately."""
        return self.state == "running" and self.silent_seconds < SILENT_SECONDS


class LaunchLog:
    """Keeps the record of a launch that runs in this process, and listens for requests to stop.

    A context manager: a thread beats until the end, which ``state`` then names. What the thread
    cannot write is logged and left, since the work itself will meet the same store.
    """

    def __init__(
        self, store: Store, launch_id: str, on: str, *, on_request: Callable[[How], None]
    ) -> None:
        self.store, self.on_request = store, on_request
        self.record = _begun(store, launch_id, on)
        self.answered: set[How] = set()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> LaunchLog:
        write_launch(self.store, self.record)
        self.thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.ended.set()
        self.thread.join()
        if error is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            message = "stopped at once" if stopped else str(error) or type(error).__name__
            self.update(state="interrupted" if stopped else "failed", message=message)
        self._write()

    def update(self, **changes: Any) -> None:
        """Set fields of the record; the next beat tells of them."""
        with self.lock:
            self.record = self.record.model_copy(update=changes)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            self._write()
            self._listen()

    def _write(self) -> None:
        self.update(heartbeat_at=_now())
        try:
            write_launch(self.store, self.record)
        except StoreError as error:
            _log.warning("the launch's record could not be written: %s", error)

    def _listen(self) -> None:
        try:
            how = stop_requested(self.store, self.record.id)
        except StoreError as error:
            _log.warning("requests to stop could not be read: %s", error)
            return
        if how is not None and how not in self.answered:
            self.answered.add(how)
            self.on_request(how)


def new_launch_id() -> str:
    """An id that sorts by the time of its making."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def write_launch(store: Store, record: LaunchRecord) -> None:
    """Publish a record, replacing the launch's earlier one."""
    store.put(f"{FOLDER}/{record.id}.json", record.model_dump_json(indent=1).encode())


def read_launch(store: Store, launch_id: str) -> LaunchRecord | None:
    """A launch's record; None if there is none, or none that can be read."""
    key = f"{FOLDER}/{launch_id}.json"
    try:
        return LaunchRecord.model_validate_json(store.get(key))
    except MissingKeyError:
        return None
    except pydantic.ValidationError as error:
        _log.warning("%s is damaged and left out: %s", key, error.errors()[0]["msg"])
        return None


def read_launches(store: Store) -> list[LaunchRecord]:
    """All launches of a run, newest last."""
    names = [key for key in store.list(f"{FOLDER}/") if key.endswith(".json")]
    found = (read_launch(store, key.removeprefix(f"{FOLDER}/")[:-5]) for key in names)
    return sorted((r for r in found if r is not None), key=lambda r: (r.started_at, r.id))


def request_stop(store: Store, launch_id: str, how: How) -> None:
    """Ask a launch to end: ``drain`` lets running units finish, ``now`` does not."""
    store.put(f"{FOLDER}/{launch_id}.stop", how.encode())


def stop_requested(store: Store, launch_id: str) -> How | None:
    """What a launch was asked to do, if anything."""
    try:
        text = store.get(f"{FOLDER}/{launch_id}.stop").decode()
    except MissingKeyError:
        return None
    return "now" if text == "now" else "drain"


def _begun(store: Store, launch_id: str, on: str) -> LaunchRecord:
    """The record at the start; who submitted it has left what the cluster calls it."""
    before, now = read_launch(store, launch_id), _now()
    return LaunchRecord(
        id=launch_id, on=on, host=socket.gethostname(), pid=os.getpid(), started_at=now,
        heartbeat_at=now, job=None if before is None else before.job,
    )  # fmt: skip


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
