"""A census on many GPUs: the real plan and the real scheduler on a simulated cluster.

    python -m tests.benchmarks.simulate [--samples N ...] [--unit-seconds S ...] [--gpus N ...]

Nothing of the policy is copied: ``pipeline.scheduler`` hands the units of the manifest's plan to an
executor whose slots, nodes, hub and store are a discrete-event simulation, on a clock of its own.
The driver is one server (each unit costs it a start and an end), the store one (each shard costs it
a request), the hub one (each byte once per node). Nodes are lost as a Poisson process and come
back empty. ``docs/scale.md`` says where the constants are from and what the answers are.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from pipeline.executor import Finished, Place
from pipeline.hub_file import HubFile
from pipeline.outcome import Outcome
from pipeline.plan import Plan
from pipeline.prefetch import Ahead
from pipeline.run import start_run
from pipeline.scheduler import Launch, Scheduler
from pipeline.specs import Task
from tasks.block import Block

MANIFEST = Path(__file__).parents[2] / "manifests/timm-vits.toml"
GPUS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Cluster:
    """The constants: seconds, bytes per second, requests per second.

    Measured with ``python -m tests.benchmarks --only engine scale`` unless they say otherwise.

    Attributes:
        gpus: Slots; one for each GPU.
        gpus_per_node: That share weights, memory and fate.
        dispatch: The driver's time per unit and, beyond that, per unit and slot.
        overhead: A slot's time per unit beside measuring.
        switch: A slot's time for a new child.
        load: Building a network and reading its weights: seconds, and bytes per second (plan's).
        hub_rate: The hub's bytes per second to all nodes together. Assumed.
        node_rate: To one node at most. Assumed.
        store_rate: New objects per second that the store takes. Assumed: S3's stated rate for one
            prefix.
        store_latency: Of one request. Assumed.
        detection: From the loss of a node until the driver knows. Measured with a pulled cable.
        hours_between_losses: Of one node. Assumed.
        return_seconds: From a node's loss until another is up in its place. Assumed.
        spread: Standard deviation of log(seconds / predicted seconds). Chosen.
        slow_nodes, slowness: Share of nodes that are slower, and by which factor. Chosen.
        seed: Of everything random.
    """

    gpus: int
    gpus_per_node: int = 8
    dispatch: tuple[float, float] = (1.7e-3, 1.1e-6)
    overhead: float = 0.012
    switch: float = 0.3
    load: tuple[float, float] = (1.0, 2e8)
    hub_rate: float = 5e9
    node_rate: float = 5e8
    store_rate: float = 3_500.0
    store_latency: float = 0.05
    detection: float = 35.0
    hours_between_losses: float = 24.0
    return_seconds: float = 300.0
    spread: float = 0.25
    slow_nodes: float = 0.02
    slowness: float = 2.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class _Attempt:
    slot: int
    task: Task
    begun: float
    seconds: float


class Server:
    """Something that does one thing after another."""

    def __init__(self) -> None:
        self.free = self.busy = 0.0

    def take(self, now: float, seconds: float) -> float:
        """When a job that comes now is done."""
        self.free = max(self.free, now) + seconds
        self.busy += seconds
        return self.free


class Clock:
    """Stands for the module ``time`` in the scheduler."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Simulated seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class Tally:
    """What happened: seconds of slots, by what they did, and counts."""

    useful: float = 0.0
    loading: float = 0.0
    waiting: float = 0.0
    lost: float = 0.0
    losses: int = 0
    first_idle: float | None = None
    ends: Counter[int] = field(default_factory=Counter)  # of units, by whole seconds


class Simulated:
    """An executor whose slots are events."""

    def __init__(self, cluster: Cluster, clock: Clock, sizes: Mapping[str, float]) -> None:
        self.cluster, self.clock, self.sizes = cluster, clock, sizes
        self.random = random.Random(cluster.seed)
        self.driver, self.store, self.hub = Server(), Server(), Server()
        self.tally = Tally()
        nodes = -(-cluster.gpus // cluster.gpus_per_node)
        self.slots = {
            slot: Place(f"node{(n := slot // cluster.gpus_per_node)}", f"gpu{slot}@{n}")
            for slot in range(cluster.gpus)
        }
        slow = max(1, round(cluster.slow_nodes * nodes)) if nodes > 1 else 0
        self.pace = {f"node{n}": cluster.slowness if n < slow else 1.0 for n in range(nodes)}
        self.down: set[str] = set()
        self.fetched: dict[str, dict[str, float]] = {node: {} for node in self.pace}
        self.subjects: dict[int, str] = {}
        self.running: dict[int, _Attempt] = {}
        self.committed: set[tuple[str, Block]] = set()
        self.events: list[tuple[float, int, Callable[[], Finished | None]]] = []
        self.number = itertools.count()
        for node in self.pace:
            self._expect_loss(node)

    @property
    def places(self) -> Mapping[int, Place]:
        """The slots of nodes that are up."""
        if not self.down:
            return self.slots
        return {s: place for s, place in self.slots.items() if place.node not in self.down}

    def prefetch(self, node: str, file: HubFile) -> None:
        """Begin to fetch weights."""
        self._fetch(node, file.filename)

    def start(self, slot: int, task: Task) -> None:
        """Begin a unit: the driver takes its time, then the slot."""
        place, cluster = self.slots[slot], self.cluster
        fixed, per_slot = cluster.dispatch
        self.clock.now = self.driver.take(self.clock.now, fixed + per_slot * cluster.gpus)
        begin, subject = self.clock.now, task.spec.subject
        ready = begin
        if self.subjects.get(slot) != subject:
            fetched = max(begin, self._fetch(place.node, subject))
            self.tally.waiting += fetched - begin
            seconds, rate = cluster.load
            loading = cluster.switch + seconds + self.sizes[subject] / rate
            self.tally.loading += loading
            ready, self.subjects[slot] = fetched + loading, subject
        noise = self.random.lognormvariate(-(cluster.spread**2) / 2, cluster.spread)
        seconds = task.predicted_seconds * noise * self.pace[place.node]
        attempt = self.running[slot] = _Attempt(slot, task, begin, seconds)
        self._at(ready + cluster.overhead + seconds, lambda: self._publish(attempt))

    def wait(self, timeout: float) -> list[Finished]:
        """What ends next, and all that ended while the driver was busy."""
        if self.tally.first_idle is None and len(self.running) < len(self.places):
            self.tally.first_idle = self.clock.now
        limit, found = self.clock.now + timeout, list[Finished]()
        while self.events and self.events[0][0] <= (self.clock.now if found else limit):
            moment, _, happen = heapq.heappop(self.events)
            self.clock.now = max(self.clock.now, moment)
            if (finished := happen()) is not None:
                found.append(finished)
        if not found:
            self.clock.now = limit
        return found

    def close(self) -> None:
        """Nothing to release."""

    def _at(self, moment: float, happen: Callable[[], Finished | None]) -> None:
        heapq.heappush(self.events, (moment, next(self.number), happen))

    def _publish(self, attempt: _Attempt) -> None:
        """A slot has its rows and writes its shard."""
        done = self.store.take(self.clock.now, 1 / self.cluster.store_rate)
        self._at(done + self.cluster.store_latency, lambda: self._end(attempt))

    def _end(self, attempt: _Attempt) -> Finished | None:
        if self.running.get(attempt.slot) is not attempt:
            return None  # lost with its node meanwhile
        del self.running[attempt.slot]
        unit = attempt.task.spec.key, attempt.task.block
        status = "duplicate" if unit in self.committed else "committed"
        self.committed.add(unit)
        self.tally.useful += attempt.seconds
        self.tally.ends[int(self.clock.now)] += 1
        return Finished(attempt.slot, attempt.task, Outcome(status, attempt.seconds))

    def _fetch(self, node: str, subject: str) -> float:
        """When a subject's weights are on a node."""
        if subject not in self.fetched[node]:
            size, now = self.sizes[subject], self.clock.now
            shared = self.hub.take(now, size / self.cluster.hub_rate)
            self.fetched[node][subject] = max(shared, now + size / self.cluster.node_rate)
        return self.fetched[node][subject]

    def _expect_loss(self, node: str) -> None:
        hours = self.cluster.hours_between_losses
        if hours:
            self._at(self.clock.now + self.random.expovariate(1 / (3600 * hours)),
                     lambda: self._lose(node))  # fmt: skip

    def _lose(self, node: str) -> None:
        """A node is gone with all that it had; the driver hears of it later."""
        now, self.fetched[node] = self.clock.now, {}
        self.down.add(node)
        for slot in [s for s in self.running if self.slots[s].node == node]:
            attempt = self.running.pop(slot)
            self.subjects.pop(slot, None)
            self.tally.lost += now - attempt.begun
            self.tally.losses += 1
            self._at(now + self.cluster.detection,
                     lambda a=attempt: Finished(a.slot, a.task, None))  # fmt: skip
        self._at(now + self.cluster.return_seconds, lambda: self.down.discard(node))
        self._expect_loss(node)


class Quiet:
    """Hears and says nothing."""

    def planned(self, plan: object, num_slots: int) -> None:
        """Nothing."""

    def ended(self, task: object, outcome: object, note: str) -> None:
        """Nothing."""


def census(samples: int, unit_seconds: float = 60.0, *, times: int = 1) -> Plan:
    """The plan of ``manifests/timm-vits.toml`` at a number of images; no hub is asked."""
    text = MANIFEST.read_text().replace("samples = 100\n", f"samples = {samples}\n")
    text = text.replace("[resources]\n", f"[resources]\nunit_seconds = {float(unit_seconds)}\n")
    with tempfile.TemporaryDirectory(prefix="flatcensus-bench-") as folder:
        path = Path(folder) / "timm-vits.toml"
        path.write_text(text)
        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", new=True):
            return start_run(path, f"{folder}/run").plan()


def simulate(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """One launch of a plan on a cluster.

    Returns:
        Simulated seconds and shares; ``scheduler_cpu`` is what the real scheduler really took here
        for each unit.
    """
    groups = plan.units.groups
    sizes = {g.spec.subject: float(g.spec.network.weight_bytes) for g in groups}
    clock = Clock()
    executor, result = Simulated(cluster, clock, sizes), Launch()
    files = {s: HubFile("simulated", "0" * 40, s, int(n), None) for s, n in sizes.items()}
    cpu = time.process_time()
    with mock.patch("pipeline.scheduler.time", clock):
        scheduler = Scheduler(
            None, executor, Quiet(), result, (), max_attempts=3,  # type: ignore[arg-type]
        )  # fmt: skip
        scheduler.add(groups, Ahead(files, per_slot=2))
        while scheduler.remaining:
            scheduler.run(until=float("inf"))
    cpu = time.process_time() - cpu
    seconds = plan.units.predicted_seconds
    makespan, tally, units = clock.now, executor.tally, len(plan.units)
    ideal = seconds / cluster.gpus
    assert result.committed + result.duplicates >= units
    assert not result.failed
    whole = cluster.gpus * makespan
    return {
        "gpus": cluster.gpus,
        "units": units,
        "gpu_hours": seconds / 3600,
        "ideal": ideal,
        "makespan": makespan,
        "utilisation": seconds / whole,
        "loading": tally.loading / whole,
        "waiting_for_weights": tally.waiting / whole,
        "tail": (makespan - (tally.first_idle or makespan)) / makespan,
        "lost": tally.lost / whole,
        "lost_units": tally.losses,
        "speculated": result.speculated,
        "driver": executor.driver.busy / makespan,
        "store": executor.store.busy / makespan,
        "puts_per_second": max(tally.ends.values()),
        "hub": executor.hub.busy / makespan,
        "scheduler_cpu": cpu / units,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per simulation."""
    shown = Table(title="Simulated launches of manifests/timm-vits.toml")
    for name in ("samples", "unit s", "GPUs", "units", "GPU-h", "ideal", "takes", "used",
                 "loading", "weights", "tail", "lost", "units lost", "driver", "store", "PUT/s",
                 "hub", "scheduler"):  # fmt: skip
        shown.add_column(name, justify="right")
    for r in rows:
        shown.add_row(
            f"{r['samples']}", f"{r['unit_seconds']:g}", f"{r['gpus']}", f"{r['units']}",
            f"{r['gpu_hours']:.3g}", f"{r['ideal']:.0f} s", f"{r['makespan']:.0f} s",
            *(f"{r[k]:.1%}" for k in ("utilisation", "loading", "waiting_for_weights", "tail",
                                      "lost")),
            f"{r['lost_units']}", f"{r['driver']:.1%}", f"{r['store']:.2%}",
            f"{r['puts_per_second']}", f"{r['hub']:.1%}", f"{1e3 * r['scheduler_cpu']:.2f} ms",
        )  # fmt: skip
    return shown


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.simulate")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 5_000])
    parser.add_argument("--unit-seconds", type=float, nargs="+", default=[60.0])
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--hours-between-losses", type=float, default=24.0)
    parser.add_argument("--hub-rate", type=float, default=Cluster.hub_rate)
    arguments = parser.parse_args()
    rows = []
    for samples, unit_seconds in itertools.product(arguments.samples, arguments.unit_seconds):
        plan = census(samples, unit_seconds)
        for gpus in arguments.gpus:
            cluster = Cluster(
                gpus, hours_between_losses=arguments.hours_between_losses,
                hub_rate=arguments.hub_rate, node_rate=min(arguments.hub_rate / 10, 1e12),
            )  # fmt: skip
            row = simulate(plan, cluster)
            rows.append({"samples": samples, "unit_seconds": unit_seconds, **row})
    Console(width=190).print(table(rows))


if __name__ == "__main__":
    main()
