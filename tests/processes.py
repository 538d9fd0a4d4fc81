"""Processes of a launch under test, found through /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def flatcensus(*arguments: object, **options) -> subprocess.Popen[str]:
    """Start the command in its own session, as a shell would."""
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **options,
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """All living descendants of a process, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            children.setdefault(int(after_name[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        queue += (below := children.get(queue.pop(0), []))
        found += below
    return found


def workers(pid: int) -> list[int]:
    """The child processes that do units: leaves below a fork server."""
    servers = [p for p in descendants(pid) if "forkserver" in _command(p) and descendants(p)]
    return [p for server in servers for p in descendants(server)]


def wait_for(condition: Callable[[], object], *, seconds: float = 120, what: str = "it") -> None:
    """Wait until a condition holds; fail the test by name if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False if the process has gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def is_alive(pid: int) -> bool:
    """Whether a process runs (zombies do not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
