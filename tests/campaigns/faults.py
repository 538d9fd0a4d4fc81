"""What can go wrong: one function per kind of fault. Each acts once on a world whose launch runs.

A function returns what it hit, or None where there was nothing to hit; the caller then tries again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from processes import kill

from campaigns.world import NUM_SLOTS, NUM_UNITS, Launch, World, wait_until

FULL_SECONDS, PAUSE_SECONDS, CABLE_SECONDS = 90.0, (0.5, 4.0), (5.0, 50.0)
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


class Kind(NamedTuple):
    """A kind of fault: how it is done, where it can be, and how a launch that meets it may end.

    Attributes:
        act: Does it.
        places: Where it can happen.
        codes: Exit codes of the launch; empty where it must go on and end with 0.
        weight: How often it is drawn; those that take a minute rarely.
    """

    act: Callable[[World, Launch, random.Random], Hit | None]
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


def disk_full(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """No space is left in the run folder; freed when the launch has ended."""
    if not world.mounted:
        return None
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
    """The wall clock of all processes jumps, by a minute or by a year."""
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
        machine.start()
    cluster.wait_for_nodes(len(cluster.machines))
    return Hit(NUM_SLOTS)


def node_killed(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """A machine that is not the head loses power, and comes back after some seconds."""
    cluster = world.cluster
    assert cluster is not None
    machine = rng.choice(cluster.machines[1:])
    if machine is world.machine:
        return None
    machine.kill()
    time.sleep(rng.uniform(0, 3))
    machine.start()
    return Hit(machine.node.cpus, note=machine.name)


def cable_pulled(world: World, launch: Launch, rng: random.Random) -> Hit | None:
    """A machine is cut off for some seconds: packets are lost, nobody is told."""
    cluster = world.cluster
    assert cluster is not None
    machine = rng.choice(cluster.machines[1:])
    if machine is world.machine:
        return None
    machine.unplug()
    seconds = rng.uniform(*CABLE_SECONDS)
    wait_until(lambda: not launch.is_running, seconds)
    machine.plug()
    return Hit(machine.node.cpus, note=f"{machine.name} for {seconds:.0f} s")


INLINE, LOCAL, CLUSTER, CABLES = "inline", "local", "cluster", "cables"
ANYWHERE = frozenset({INLINE, LOCAL, CLUSTER})
WORKERS = frozenset({LOCAL, CLUSTER})
KINDS: dict[str, Kind] = {
    "child killed": Kind(child_killed, WORKERS),
    "child stopped": Kind(child_stopped, WORKERS),
    "slot killed": Kind(slot_killed, WORKERS),
    "slot paused": Kind(slot_paused, WORKERS),
    "node killed": Kind(node_killed, frozenset({CLUSTER}), weight=0.5),
    "head killed": Kind(head_killed, frozenset({CLUSTER}), frozenset({4}), 0.15),
    "own head killed": Kind(gcs_killed, frozenset({LOCAL}), frozenset({4}), 0.1),
    "cable pulled": Kind(cable_pulled, frozenset({CABLES})),
    "driver killed": Kind(driver_killed, ANYWHERE, frozenset({-signal.SIGKILL}), 0.7),
    "driver paused": Kind(driver_paused, ANYWHERE),
    "interrupted once": Kind(interrupted_once, ANYWHERE, frozenset({130}), 0.5),
    "interrupted twice": Kind(interrupted_twice, ANYWHERE, frozenset({130}), 0.5),
    "out of memory": Kind(out_of_memory, ANYWHERE),
    "disk full": Kind(disk_full, ANYWHERE, frozenset({4}), 0.5),
    "shard truncated": Kind(shard_truncated, ANYWHERE),
    "shard flipped": Kind(shard_flipped, ANYWHERE),
    "clock jump": Kind(clock_jump, ANYWHERE),
    "second launch": Kind(second_launch, ANYWHERE, weight=0.4),
    "compacted": Kind(compacted, ANYWHERE, weight=0.5),
}


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
    """Change a file of results in place, as a failing disk does: it stays the same file."""
    paths = world.shards()
    if not paths:
        return None
    path = rng.choice(paths)
    try:
        _write_in_place(path, change(path.read_bytes()))
    except FileNotFoundError:  # it was compacted or set aside meanwhile
        return None
    spoiled = NUM_UNITS if path.parent.name == "packs" else 1
    return Hit(damaged=spoiled, note=str(path.relative_to(world.run)))


def _write_in_place(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)
        file.truncate(len(data))
        os.fsync(file.fileno())
