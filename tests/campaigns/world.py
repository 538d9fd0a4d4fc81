"""A run under attack: its folder, how it is launched, what can be seen of it while it runs.

The run folder is a small file system of its own where root can mount one, so that it can be full.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from faulty_s3 import FaultyS3
from machines import Cluster, Machine
from processes import descendants, is_alive, kill, wait_for, workers

from campaigns.measured import ATTEMPTS, OUT_OF_MEMORY, UNIT_SAMPLES
from campaigns.warm import Process, flatcensus
from campaigns.workshop import NUM_NETWORKS, Workshop
from pipeline.store import open_store

NUM_SAMPLES, PAUSE_SECONDS = 96, 0.1
NUM_UNITS = (NUM_NETWORKS + 1) * NUM_SAMPLES // UNIT_SAMPLES
NUM_SLOTS = 2
DISK_BYTES = 48 * 2**20
PATIENCE_SECONDS = 180.0  # for a launch to end by itself: chosen
MANIFEST = """
name = "campaign"
[data]
name = "digits"
samples = {samples}
[[train]]
name = "trained"
network = "mlp"
width = 8
steps = 5
[[checkpoints]]
source = "local"
paths = ["../checkpoints/*"]
[[measurements]]
metric = "steady"
seconds = {seconds}
[[correlations]]
x = "steady"
y = "double"
[pair_plot]
[resources]
unit_seconds = 1e-9
max_slots = {slots}
max_attempts = 50
hang_seconds = 4.0
"""


class Attempt(NamedTuple):
    """What is known of one try at a unit; ``ended`` is None where it never did."""

    unit: str
    samples: tuple[int, int]
    pid: int
    began: float
    ended: float | None


@dataclass
class Launch:
    """A command that works on the run."""

    process: Process | subprocess.Popen[str]
    output: Path
    codes: set[int] = field(default_factory=lambda: {0})  # that it may end with
    began: float = field(default_factory=time.monotonic)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def ended(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit code, after at most so long; then it is killed, and 'hung' is its code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            end_family(self.process.pid)
            return HUNG


HUNG = 999


class World:
    """One episode: a fresh run in ``world/run``. Use as a context manager."""

    def __init__(
        self,
        workshop: Workshop,
        *,
        on: str,
        cluster: Cluster | None = None,
        machine: Machine | None = None,
        uri: str | None = None,
        network: FaultyS3 | None = None,
        environment: Mapping[str, str] | None = None,
        pause: float = PAUSE_SECONDS,
    ) -> None:
        self.workshop, self.on, self.pause = workshop, on, pause
        self.cluster, self.machine, self.network = cluster, machine, network
        self.folder = workshop.world
        self.run = self.folder / "run"
        self.uri = uri or str(self.run)
        self.environment = {
            **os.environ, **(cluster.environment if cluster else {}), **(environment or {})
        }  # fmt: skip
        self.launches: list[Launch] = []
        self.beside: list[Launch] = []  # commands that others gave meanwhile
        self.seen: set[int] = set()  # processes that were attacked already
        self.mounted = False

    def __enter__(self) -> World:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.run.mkdir(parents=True)
        text = MANIFEST.format(samples=NUM_SAMPLES, seconds=self.pause, slots=NUM_SLOTS)
        (self.folder / "campaign.toml").write_text(text)
        # Machines with namespaces of their own do not see what is mounted now.
        if os.geteuid() == 0 and self.uri == str(self.run) and self.machine is None:
            size = f"size={DISK_BYTES}"
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "campaign", self.run])
            self.mounted = done.returncode == 0
        self.workshop.set_clock(0)
        return self

    def __exit__(self, *_: object) -> None:
        for launch in (*self.launches, *self.beside):
            end_family(launch.process.pid)
        if self.mounted:
            subprocess.run(["umount", "-l", self.run], check=True)

    def launch(self, command: str = "launch", *, on: str | None = None) -> Launch:
        """Start ``launch`` or ``resume``."""
        what = (
            [self.folder / "campaign.toml", "--run", self.uri] if command == "launch"
            else [self.uri]
        )  # fmt: skip
        launch = self.start(command, *what, "--on", on or self.on)
        self.launches.append(launch)
        return launch

    def leftovers(self) -> list[Path]:
        """Hidden files below the run folder: what nobody has finished or removed."""
        return sorted(p for p in self.run.rglob(".*") if p.is_file())

    def start(self, *arguments: object) -> Launch:
        """Start any command."""
        output = self.folder / f"output-{len(list(self.folder.glob('output-*')))}.txt"
        texts = [str(a) for a in arguments]
        if self.machine is None and self.network is None:
            process = flatcensus(
                texts, output=output, folder=self.folder, environment=self.environment
            )
            return Launch(process, output)
        # From a cold start: on another machine, or because a client of S3 survives no fork.
        program = Path(__file__).with_name("command.py")
        popen = self.machine.popen if self.machine else _popen
        with output.open("wb") as file:
            process = popen(
                sys.executable, program, *texts, env=self.environment, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        return Launch(process, output)

    # What can be seen.

    def attempts(self) -> list[Attempt]:
        """All tries at units so far."""
        begun: dict[tuple[int, str, int], tuple[float, tuple[int, int]]] = {}
        found = []
        path = self.folder / ATTEMPTS
        for line in path.read_text().splitlines() if path.exists() else ():
            note = json.loads(line)
            key = (note["pid"], note["unit"], note["samples"][0])
            if note["what"] == "begin":
                if key in begun:  # the same process, again: an exception ended the former
                    found.append(_attempt(key, *begun.pop(key), None))
                begun[key] = (note["at"], tuple(note["samples"]))
            else:
                found.append(_attempt(key, *begun.pop(key), note["at"]))
        found += [_attempt(key, *rest, None) for key, rest in begun.items()]
        return sorted(found, key=lambda a: a.began)

    def num_done(self) -> int:
        """Units that were finished at least once."""
        return len({(a.unit, a.samples) for a in self.attempts() if a.ended is not None})

    def results(self) -> list[str]:
        """Keys of what holds results."""
        store = open_store(self.uri)
        return [*store.list("shards/"), *store.list("packs/")]

    def spoil(self, key: str, change: Callable[[bytes], bytes]) -> None:
        """Change an object as a failing disk does, which sets no new time of change."""
        store = open_store(self.uri)
        data = change(store.get(key))
        if self.uri != str(self.run):
            store.put(key, data)
            return
        path = self.run / key
        before = path.stat()
        with path.open("r+b") as file:
            file.write(data)
            file.truncate(len(data))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def family(self) -> Iterator[int]:
        """All processes that work for this world, but the commands themselves."""
        roots = [launch.process.pid for launch in self.launches if launch.is_running]
        if self.cluster is not None:
            roots += [p for m in self.cluster.machines for p in m.processes("")]
        for root in dict.fromkeys(roots):
            yield from descendants(root)

    def named(self, part: str) -> list[int]:
        """Living processes of the family with this in their command line."""
        return [p for p in dict.fromkeys(self.family()) if part in _command(p) and is_alive(p)]

    def children(self) -> list[int]:
        """Processes that do units now and were not attacked yet."""
        roots = [launch.process.pid for launch in self.launches if launch.is_running]
        if self.cluster is not None:
            roots += [m.process.pid for m in self.cluster.machines if m.process]
        found = dict.fromkeys(p for root in roots for p in workers(root))
        return [p for p in found if p not in self.seen and is_alive(p)]

    def request_out_of_memory(self) -> None:
        """The next unit that begins runs out of memory."""
        (self.folder / OUT_OF_MEMORY).touch()


def end_family(pid: int) -> None:
    """Kill a process and all that came from it."""
    for process in (*descendants(pid), pid):
        kill(process)


def wait_until(condition: Any, seconds: float) -> bool:
    """Whether a condition came true in time."""
    try:
        wait_for(condition, seconds=seconds)
    except AssertionError:
        return False
    return True


def _popen(*command: object, **options: Any) -> subprocess.Popen[str]:
    texts = list(map(str, command))
    return subprocess.Popen(texts, text=True, start_new_session=True, **options)


def _attempt(
    key: tuple[int, str, int], began: float, samples: tuple[int, int], ended: float | None
) -> Attempt:
    return Attempt(key[1], samples, key[0], began, ended)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
