"""What can go wrong: one function per kind of fault. Each acts once on a world whose launch runs.

A function returns what it hit, or None where there was nothing to hit; the caller then tries again.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from machines import Machine
from processes import kill

from campaigns.world import NUM_SLOTS, NUM_UNITS, Launch, World, wait_until
from pipeline.store import MissingKeyError

FULL_SECONDS = 90.0
PAUSE_SECONDS, CABLE_SECONDS, NETWORK_SECONDS = (0.5, 4.0), (5.0, 50.0), (1.0, 4.0)
GIVING_UP_SECONDS = 10.0  # in which a node that counts as dead hears of it and ends
JUMPS = (-400 * 86400, -7200, -60, 60, 7200, 400 * 86400)  # of the wall clock, in seconds


class Hit(NamedTuple):
    """What a fault did.

    Attributes:
        slots: Slots whose unit in flight may be lost, one each.
        damaged: Results that were spoiled after they had been committed.
        note: What exactly was hit, for the report of a violation.
    """

    slots: int = 0
    damaged: int = 0
    note: str = ""


Act = Callable[[World, Launch, random.Random], Hit | None]


class Kind(NamedTuple):
    """A kind of fault: how it is done, where it can be, and how a launch that meets it may end.

    Attributes:
        act: Does it.
        places: Where it can happen.
        codes: Exit codes of the launch; empty where it must go on and end with 0.
        weight: How often it is drawn; those that take a minute rarely.
    """

    act: Act
    places: frozenset[str]
    codes: frozenset[int] = frozenset()
    weight: float = 1.0


def child_killed(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """SIGKILL to a process that does units, as the kernel does when memory ends."""
    return _signalled(world, world.children(), signal.SIGKILL, rng)


def child_stopped(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """SIGSTOP to it, for ever: it hangs."""
    return _signalled(world, world.children(), signal.SIGSTOP, rng)


def slot_killed(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """SIGKILL to the actor that is a slot."""
    return _signalled(world, world.named("ray::SlotActor"), signal.SIGKILL, rng)


def slot_paused(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """SIGSTOP to a slot, and SIGCONT after some seconds."""
    return _paused(world.named("ray::SlotActor"), rng)


def driver_paused(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """The same to the scheduler."""
    return _paused([launch.process.pid], rng)


def driver_killed(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """SIGKILL to the scheduler."""
    return Hit(NUM_SLOTS) if kill(launch.process.pid) else None


def interrupted_once(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """Ctrl-C: running units are finished."""
    return Hit() if kill(launch.process.pid, signal.SIGINT) else None


def interrupted_twice(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """Ctrl-C, and again: stop at once."""
    if not kill(launch.process.pid, signal.SIGINT):
        return None
    time.sleep(rng.uniform(0.02, 0.3))
    kill(launch.process.pid, signal.SIGINT)
    return Hit(NUM_SLOTS)


def out_of_memory(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """The next unit that begins asks for more memory than there is."""
    world.request_out_of_memory()
    return Hit(1)


def s3_outage(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """The bucket is not there, until the launch has given it up."""
    assert world.network is not None
    _allow(world, 4)
    world.network.rates = {"refuse": 1.0}
    launch.ended()
    world.network.rates = {}
    return Hit(NUM_SLOTS)


def disk_full(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """No space is left in the run folder; freed when the launch has ended."""
    if not world.mounted:
        return None
    _allow(world, 4)
    filler = world.run / ".filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    launch.ended(FULL_SECONDS)
    filler.unlink()
    return Hit(NUM_SLOTS)


def shard_truncated(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """A file of results loses its end."""
    return _damaged(world, rng, lambda data: data[: rng.randrange(len(data))])


def shard_flipped(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """One bit of a file of results turns over."""

    def flipped(data: bytes) -> bytes:
        bit = rng.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return _damaged(world, rng, flipped)


def clock_jump(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """The wall clock of all processes jumps, by a minute or by a year.

    Not under Ray: its waits end at times of the kernel's clock, which knows nothing of this.
    """
    if not world.workshop.has_wrong_clock:
        return None
    seconds = rng.choice(JUMPS)
    world.workshop.set_clock(seconds)
    return Hit(note=f"by {seconds} s")


def second_launch(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """Somebody launches the same run beside it."""
    if len(world.beside) >= 2:
        return None
    world.beside.append(world.launch(on="inline"))
    return Hit()


def compacted(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """Somebody compacts the run meanwhile."""
    command = world.start("compact", world.uri)
    command.codes = {0, 3}  # the latter where it meets a damaged shard
    world.beside.append(command)
    return Hit()


def gcs_killed(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """SIGKILL to the head of the cluster that the launch has started for itself."""
    return _signalled(world, world.named("gcs_server"), signal.SIGKILL, rng, slots=NUM_SLOTS)


def head_killed(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """The head of the cluster loses power, and is started again when the launch has ended."""
    cluster = world.cluster
    assert cluster is not None
    cluster.head.kill()
    launch.ended()
    for machine in cluster.machines:  # their raylets have ended with it
        machine.kill()
    for number, machine in enumerate(cluster.machines, start=1):
        machine.start()
        cluster.wait_for_nodes(number)
    return Hit(NUM_SLOTS)


def _worker(world: World, rng: random.Random) -> Machine | None:
    """A machine that is neither the head nor the command's own."""
    assert world.cluster is not None
    machine = rng.choice(world.cluster.machines[1:])
    return None if machine is world.machine else machine


def node_killed(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """A machine that is not the head loses power, and comes back after some seconds."""
    machine = _worker(world, rng)
    if machine is None:
        return None
    machine.kill()
    time.sleep(rng.uniform(0, 3))
    machine.start()
    return Hit(machine.node.cpus, note=machine.name)


def cable_pulled(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """A machine is cut off for some seconds: packets are lost, nobody is told.

    Ray that was cut off for long ends itself when it hears so; then it is started again, as
    whoever runs a cluster would.
    """
    machine = _worker(world, rng)
    if machine is None:
        return None
    machine.unplug()
    seconds = rng.uniform(*CABLE_SECONDS)
    wait_until(lambda: not launch.is_running, seconds)
    machine.plug()
    if wait_until(lambda: not machine.runs, GIVING_UP_SECONDS):
        machine.kill()
        machine.start()
    return Hit(machine.node.cpus, note=f"{machine.name} for {seconds:.0f} s")


def _allow(world: World, code: int) -> None:
    """Commands that run beside the launch may end so too."""
    for command in world.beside:
        command.codes = command.codes | {code}


def _signalled(
    world: World, pids: list[int], number: int, rng: random.Random, *, slots: int = 1
) -> Hit | None:
    pids = [pid for pid in pids if pid not in world.seen]
    if not pids:
        return None
    pid = rng.choice(pids)
    world.seen.add(pid)
    return Hit(slots, note=f"pid {pid}") if kill(pid, number) else None


def _paused(pids: list[int], rng: random.Random) -> Hit | None:
    if not pids or not kill(pid := rng.choice(pids), signal.SIGSTOP):
        return None
    seconds = rng.uniform(*PAUSE_SECONDS)
    time.sleep(seconds)
    kill(pid, signal.SIGCONT)
    return Hit(note=f"pid {pid} for {seconds:.1f} s")


def _damaged(world: World, rng: random.Random, change: Callable[[bytes], bytes]) -> Hit | None:
    keys = world.results()
    if not keys:
        return None
    key = rng.choice(keys)
    try:
        world.spoil(key, change)
    except (FileNotFoundError, MissingKeyError):  # it was compacted or set aside meanwhile
        return None
    return Hit(damaged=NUM_UNITS if key.startswith("packs/") else 1, note=key)


def _faulty_network(**rates: float) -> Act:
    """Requests to the bucket fail at these rates for some seconds."""

    def act(world: World, launch: Launch, rng: random.Random) -> Hit | None:
        assert world.network is not None
        world.network.rates = {name.removeprefix("status_"): rate for name, rate in rates.items()}
        wait_until(lambda: not launch.is_running, rng.uniform(*NETWORK_SECONDS))
        world.network.rates = {}
        return Hit()

    return act


INLINE, LOCAL, CLUSTER, CABLES, BUCKET = "inline", "local", "cluster", "cables", "bucket"
FOLDERS = frozenset({INLINE, LOCAL, CLUSTER})
ANYWHERE = FOLDERS | {BUCKET}
WORKERS = frozenset({LOCAL, CLUSTER})
BUCKETS = frozenset({BUCKET})
# The second where the signal arrives when Python has already put its handlers away: shells say
# 130 of either.
INTERRUPTED = frozenset({130, -signal.SIGINT})
KINDS: dict[str, Kind] = {
    "child killed": Kind(child_killed, WORKERS | {CABLES}, weight=0.5),
    "child stopped": Kind(child_stopped, WORKERS),
    "slot killed": Kind(slot_killed, WORKERS),
    "slot paused": Kind(slot_paused, WORKERS),
    "node killed": Kind(node_killed, frozenset({CLUSTER}), weight=0.5),
    "head killed": Kind(head_killed, frozenset({CLUSTER}), frozenset({0, 4}), 0.15),
    "own head killed": Kind(gcs_killed, frozenset({LOCAL}), frozenset({0, 4}), 0.1),
    "cable pulled": Kind(cable_pulled, frozenset({CABLES})),
    "driver killed": Kind(driver_killed, ANYWHERE, frozenset({-signal.SIGKILL}), 0.7),
    "driver paused": Kind(driver_paused, ANYWHERE),
    "interrupted once": Kind(interrupted_once, ANYWHERE, INTERRUPTED, 0.5),
    "interrupted twice": Kind(interrupted_twice, ANYWHERE, INTERRUPTED, 0.5),
    "out of memory": Kind(out_of_memory, ANYWHERE),
    "disk full": Kind(disk_full, FOLDERS, frozenset({4}), 0.5),
    "shard truncated": Kind(shard_truncated, ANYWHERE),
    "shard flipped": Kind(shard_flipped, ANYWHERE),
    "clock jump": Kind(clock_jump, frozenset({INLINE, BUCKET})),
    "second launch": Kind(second_launch, ANYWHERE, weight=0.4),
    "compacted": Kind(compacted, ANYWHERE, weight=0.5),
    "S3 errors": Kind(
        _faulty_network(status_500=0.15, status_503=0.1, slow_down=0.1, reset=0.1), BUCKETS
    ),
    "S3 lost replies": Kind(_faulty_network(lost=0.15, late_500=0.1, conflict=0.1), BUCKETS),
    "S3 partial transfers": Kind(_faulty_network(upload_cut=0.2, cut=0.2), BUCKETS),
    "S3 stalls": Kind(_faulty_network(stall=0.1, delay=0.2), BUCKETS),
    "S3 outage": Kind(s3_outage, BUCKETS, frozenset({4}), 0.4),
}
