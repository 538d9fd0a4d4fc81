"""A slot: one worker's share of a machine, and the child process that does its units.

The child serves one subject (checkpoint) and is replaced when the subject changes, so memory
returns by process exit and a crash in native code costs one unit. Children are forked from a
server that has torch and timm loaded: a new one is ready in a fraction of a second. The slot itself
loads neither, holds no result, and can be killed at any time: shards are committed by the child.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.outcome import HINTS, FailureClass, Outcome
from pipeline.schema import Failure
from pipeline.versions import versions

HEARTBEAT_SECONDS = 1.0
HEARTBEAT = b""
MORE, LAST = b"\0", b"\1"  # before an outcome: whether the child takes another task
# What children would otherwise load one by one, at half a second each. The third is what torch
# loads at the first forward-mode derivative, the last reads `digits`.
PRELOAD = ["pipeline.worker", "timm", "torch._decomp.decompositions_for_jvp", "sklearn.datasets"]


class Slot:
    """Runs units one at a time in a child process; notices when the child dies or goes silent."""

    def __init__(self, hang_seconds: float) -> None:
        self.hang_seconds = hang_seconds
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.child: multiprocessing.process.BaseProcess | None = None
        self.pipe: Connection | None = None
        self.subject = ""

    def run(self, subject: str, task: bytes) -> bytes:
        """Do one unit: a pickled Task in, a pickled Outcome out.

        Both stay pickled here, because reading a Task would load torch into the slot. Never raises
        for what the unit or its process does.
        """
        started = time.monotonic()
        try:
            pipe = self._child_for(subject)
            pipe.send_bytes(task)
            return self._await(pipe, started)
        except (EOFError, OSError) as error:
            code = self._stop()
            if code is None:
                return _died("crash", f"No worker process could be started: {error!r}", started)
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            return _died("crash", f"The worker process died ({cause})", started)

    def close(self) -> None:
        """End the child."""
        self._stop()

    def _await(self, pipe: Connection, started: float) -> bytes:
        while True:
            if not pipe.poll(self.hang_seconds):
                self._stop()
                silent = f"No sign of life for {self.hang_seconds:g} s; the worker was killed"
                return _died("hang", silent, started)
            message = pipe.recv_bytes()
            if message == HEARTBEAT:
                continue
            if message[:1] == LAST:
                self._stop()
            return message[1:]

    def _child_for(self, subject: str) -> Connection:
        if (
            self.pipe is not None
            and self.subject == subject
            and self.child
            and self.child.is_alive()
        ):
            return self.pipe
        self._stop()
        ours, theirs = self.context.Pipe()
        child = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        child.start()
        theirs.close()
        self.child, self.pipe, self.subject = child, ours, subject
        return ours

    def _stop(self) -> int | None:
        if self.child is None:
            return None
        if self.pipe is not None:
            self.pipe.close()
        # A child that is between units ends by itself at the closed pipe; a silent one is killed.
        self.child.join(timeout=0.05)
        if self.child.exitcode is None:
            self.child.kill()
            self.child.join()
        code = self.child.exitcode
        self.child, self.pipe, self.subject = None, None, ""
        return code


@dataclass(frozen=True)
class Hello:
    """What a slot says of itself: what it computes with, where it is, whether it has a unit.

    ``pool`` names the memory that it shares with its neighbours (a GPU's, or the machine's) and
    ``pool_bytes`` its size, None where that cannot be told.
    """

    versions: dict[str, str]
    node: str
    host: str
    pool: str
    pool_bytes: int | None
    is_busy: bool


class SlotActor:
    """The Ray side of a slot. Ray imports this module in its workers: keep it light.

    It has two threads, so that it answers while a unit runs: silence means that its process, its
    machine or the network is gone.
    """

    def __init__(self, hang_seconds: float) -> None:
        # Children of multiprocessing first load the program that their parent runs. Here that is
        # Ray's worker: they have no use for it, and it takes longer than all the rest.
        sys.modules["__main__"].__file__ = None
        self.slot = Slot(hang_seconds)
        self.busy = threading.Lock()
        # Loads torch while the scheduler is still counting slots.
        multiprocessing.forkserver.ensure_running()

    def hello(self) -> Hello:
        """See Hello."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        gpus = ray.get_gpu_ids()
        pool = f"{node} gpu {gpus[0]}" if gpus else node
        size = _gpu_bytes(str(gpus[0])) if gpus else _memory_bytes()
        return Hello(versions(), node, socket.gethostname(), pool, size, self.busy.locked())

    def ping(self) -> None:
        """Answer."""

    def run(self, subject: str, task: bytes) -> bytes:
        """Do one unit; see ``Slot.run``."""
        with self.busy:
            return self.slot.run(subject, task)


def _memory_bytes() -> int | None:
    """Memory of this machine, or of the container that it is."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # the other version, or "max"
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
    return total


def _gpu_bytes(gpu: str) -> int | None:
    """Memory of a GPU as its driver's tool has it; torch would take seconds and memory to ask."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits", f"--id={gpu}"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(answer.stdout) * 2**20
    return None


def _died(kind: FailureClass, message: str, started: float) -> bytes:
    failure = Failure(class_=kind, type="WorkerDied", message=message, hint=HINTS[kind])
    return pickle.dumps(Outcome("failed", time.monotonic() - started, failure, kind))


def _serve(pipe: Connection) -> None:
    """The child: tasks from the pipe, outcomes back, a heartbeat from a thread beside them."""
    import signal

    from pipeline.worker import Workbench, run_unit

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    bench, lock, busy = Workbench(), threading.Lock(), threading.Event()

    def beat() -> None:
        while True:
            busy.wait()
            time.sleep(HEARTBEAT_SECONDS)
            try:
                with lock:
                    if busy.is_set():
                        pipe.send_bytes(HEARTBEAT)
            except OSError:
                os._exit(1)  # the slot is gone: nobody waits for this unit

    threading.Thread(target=beat, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the slot is gone or has closed the pipe
        while True:
            task = pickle.loads(pipe.recv_bytes())
            busy.set()
            outcome = run_unit(task, bench)
            # After an unknown error the process may be unfit (a broken CUDA context, for one).
            last = outcome.failure_class == "unexpected"
            with lock:
                busy.clear()
                pipe.send_bytes((LAST if last else MORE) + pickle.dumps(outcome))
            if last:
                return
