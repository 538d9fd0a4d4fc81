"""The ``flatcensus`` command in a process of its own that need not load its libraries first.

It is forked from this process, which has loaded them: a launch begins in a tenth of a second
instead of four, and a campaign makes hundreds. Everything else is as in a shell: a session of its
own, its own output, its own signals.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

# What any command would load, but Ray: it reads the cluster's token when it is loaded.
import sklearn.datasets  # noqa: F401
import timm  # noqa: F401

import campaigns.measured  # noqa: F401
import pipeline.launching
import pipeline.outputs
import pipeline.ray_executor
import pipeline.run
import pipeline.worker  # noqa: F401
from pipeline.cli import main


class Process:
    """A child of this process; what ``subprocess.Popen`` has and campaigns need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Exit code. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("flatcensus", timeout)
            time.sleep(0.01)
        return code


def flatcensus(
    arguments: Sequence[str], *, output: Path, folder: Path, environment: Mapping[str, str]
) -> Process:
    """Start a command with its output in a file."""
    pid = os.fork()
    if pid:
        return Process(pid)
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        os.closerange(3, 256)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["flatcensus", *arguments]
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
