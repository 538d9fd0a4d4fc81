"""A launch as a cluster's job: ``python -m pipeline.job RUN --launch ID``, from ray_jobs.py.

It differs from ``flatcensus resume RUN --on ADDRESS`` in three things: it joins the cluster that it
runs on, it has the launch's name from its submitter, and it copies its own log into the run folder,
every few seconds and when it ends, so that the log outlives the cluster.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from pipeline.console import Console
from pipeline.errors import (
    EXIT_INTERRUPTED,
    EXIT_UNEXPECTED,
    FlatcensusError,
    ResourceError,
    StoreError,
)
from pipeline.launches import FOLDER, read_launch, write_launch
from pipeline.launching import launch_run
from pipeline.store import Store, open_store

FIRST_SECONDS, COPY_SECONDS = 1.0, 10.0  # before the first copy of the log, later ones: chosen
OWN_OUTPUT = Path("/proc/self/fd/1")  # Ray has redirected it into the job's log


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the launch; the exit code is that of ``launch``."""
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    parser = argparse.ArgumentParser(prog="python -m pipeline.job", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--launch", required=True)
    parser.add_argument("--retry-failed", action="store_true")
    given = parser.parse_args(arguments)
    console = Console()
    store = open_store(given.run)
    with LogCopy(store, given.launch, console):
        try:
            return _launch(console, store, given)
        except KeyboardInterrupt:
            console.error("stopped at once; what was committed stands")
            return EXIT_INTERRUPTED
        except FlatcensusError as error:
            console.error(str(error))
            _tell(store, given.launch, str(error), console)
            return error.exit_code
        except Exception as error:
            traceback.print_exc()  # the log is all that remains of this process
            _tell(store, given.launch, f"unexpected {type(error).__name__}: {error}", console)
            return EXIT_UNEXPECTED


class LogCopy:
    """Copies what this process prints into the run folder while it lives, and at the end."""

    def __init__(self, store: Store, launch_id: str, console: Console) -> None:
        self.store, self.console = store, console
        self.key = f"{FOLDER}/{launch_id}.log"
        self.copied = -1
        self.works = True
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> LogCopy:
        if OWN_OUTPUT.resolve().is_file():  # not a terminal or a pipe: there is a log to copy
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread.ident is not None:
            self.ended.set()
            self.thread.join()
            self._copy()

    def _repeat(self) -> None:
        pause = FIRST_SECONDS
        while not self.ended.wait(pause):
            self._copy()
            pause = min(2 * pause, COPY_SECONDS)

    def _copy(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        text = OWN_OUTPUT.read_bytes()
        if len(text) == self.copied:
            return
        try:
            self.store.put(self.key, text)
        except StoreError as error:
            if self.works:  # once: the log would grow by this line at every try
                self.console.warn(f"this log cannot be copied to {self.store.uri}: {error}")
            self.works = False
            return
        self.copied, self.works = len(text), True


def _launch(console: Console, store: Store, given: argparse.Namespace) -> int:
    from pipeline.run import open_run

    if read_launch(store, given.launch) is None:
        raise ResourceError(
            f"{socket.gethostname()} does not see the run folder {given.run}: what was written "
            "there when the job was submitted is missing. Use a directory that all nodes share "
            "under this path, or s3://bucket/prefix"
        )
    return launch_run(
        console, open_run(given.run), on=os.environ.get("RAY_ADDRESS", "auto"),
        retry_failed=given.retry_failed, launch_id=given.launch,
    )  # fmt: skip


def _tell(store: Store, launch_id: str, message: str, console: Console) -> None:
    """Leave the reason in the launch's record, if it has not begun and left one itself."""
    try:
        record = read_launch(store, launch_id)
        if record is not None and record.state in ("submitted", "running"):
            changes = {"state": "failed", "message": message}
            write_launch(store, record.model_copy(update=changes))
    except StoreError as error:
        console.warn(f"the launch's record cannot be written: {error}")


if __name__ == "__main__":
    raise SystemExit(main())
