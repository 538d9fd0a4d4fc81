"""One episode: a run from nothing to its end, with faults on the way, and the verdict."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from campaigns import compare
from campaigns.faults import KINDS, Hit
from campaigns.world import HUNG, NUM_UNITS, Launch, World, wait_until

RESUMES = 3  # after the last fault, before an episode counts as never complete: chosen
LAST_UNITS = 6  # nothing is attacked once so few are left: it would come too late
OLD_SECONDS = 7200  # age that makes what a killed writer left a thing to be cleaned
HIT_SECONDS = 20.0  # to find something that a kind of fault can hit


@dataclass
class Fault:
    """A fault that was done."""

    kind: str
    at: float
    hit: Hit
    came: compare.Consequence = compare.NOTHING


@dataclass
class Episode:
    """What happened to one run."""

    seed: int
    place: str
    faults: list[Fault] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    launches: int = 0
    rows: compare.Rows = compare.ALL_ROWS
    work: compare.Work = compare.NO_WORK
    seconds: float = 0.0


def run_episode(
    making: AbstractContextManager[World],
    kinds: Sequence[str],
    expected: dict[str, bytes],
    *,
    place: str,
    seed: int,
) -> Episode:
    """Attack a run with these kinds of faults in turn, resume it to its end, and compare."""
    result, rng, started = Episode(seed, place), random.Random(seed), time.monotonic()
    with making as world:
        launch = world.launch()
        for kind in kinds:
            launch = _running(world, launch, result, rng)
            fault = _attacked(world, launch, kind, rng)
            if fault is None:
                continue
            result.faults.append(fault)
            if KINDS[kind].codes:
                launch.codes = set(KINDS[kind].codes)
                _check_end(launch, result)
        _check_end(launch, result)
        for command in world.beside:
            _check_end(command, result)
        world.workshop.set_clock(0)
        _complete(world, expected, result)
        attempts = world.attempts()
        came = compare.consequences(attempts, [fault.at for fault in result.faults])
        for fault, consequence in zip(result.faults, came, strict=True):
            fault.came = consequence
        result.launches = len(world.launches)
        result.work = compare.work(attempts)
        result.rows = compare.rows(compare.tables(world), expected)
        _check_work(result)
        if result.violations:
            _tell(world, result)
    result.seconds = time.monotonic() - started
    return result


def _running(world: World, launch: Launch, result: Episode, rng: random.Random) -> Launch:
    """A launch that runs and has done something: this one, or another if it has ended."""
    if not launch.is_running:
        _check_end(launch, result)
        if world.num_done() >= NUM_UNITS - LAST_UNITS:
            return launch
        launch = world.launch(rng.choice(["launch", "resume"]))
    done, more = world.num_done(), rng.randint(0, 6)
    # Sometimes before it has done anything, mostly when it works.
    patience = rng.choice([1.0, 60.0, 60.0, 60.0])
    wait_until(lambda: world.num_done() > done + more or not launch.is_running, patience)
    time.sleep(rng.uniform(0, 0.2))
    return launch


def _attacked(world: World, launch: Launch, kind: str, rng: random.Random) -> Fault | None:
    """Do a fault as soon as there is something to hit; None if the run was done before."""
    end = time.monotonic() + HIT_SECONDS
    while time.monotonic() < end and launch.is_running:
        if world.num_done() >= NUM_UNITS - LAST_UNITS:
            return None
        at = time.monotonic()
        hit = KINDS[kind].act(world, launch, rng)
        if hit is not None:
            return Fault(kind, at, hit)
        time.sleep(0.1)
    return None


def _check_end(launch: Launch, result: Episode) -> None:
    """Wait for a command's end; it must be one of those that its faults allow."""
    code = launch.ended()
    if code not in launch.codes:
        what = "did not end" if code == HUNG else f"ended with {code}"
        text = launch.output.read_text(errors="replace")[-1500:]
        result.violations.append(f"a command {what}, expected {sorted(launch.codes)}:\n{text}")
    launch.codes = {code}  # told once


def _complete(world: World, expected: dict[str, bytes], result: Episode) -> None:
    """Resume until nothing is left to do, then compare."""
    for path in world.leftovers():  # so old that the next launch may remove it
        os.utime(path, (time.time() - OLD_SECONDS,) * 2)
    wrong: list[str] = []
    for _ in range(RESUMES):
        _check_end(world.launch("resume", on="inline"), result)
        wrong = compare.differences(world, expected)
        if not wrong:
            break
    result.violations += wrong
    _check_end(world.start("verify", world.uri), result)


def _check_work(result: Episode) -> None:
    """At most one unit is lost per slot that a fault hit, and done again per result it spoiled."""
    slots = sum(fault.hit.slots for fault in result.faults)
    spoiled = sum(fault.hit.damaged for fault in result.faults)
    if result.work.lost > slots:
        result.violations.append(f"{result.work.lost} units lost by faults on {slots} slots")
    shared = any(fault.kind in ("second launch", "cable pulled") for fault in result.faults)
    if not shared and result.work.recomputed > slots + spoiled:
        result.violations.append(
            f"{result.work.recomputed:g} units done again, by faults on {slots} slots and "
            f"{spoiled} results"
        )


def _tell(world: World, result: Episode) -> None:
    """Keep the outputs of all commands beside what was wrong."""
    for path in sorted(world.folder.glob("output-*")):
        text = path.read_text(errors="replace")[-1500:]
        result.violations.append(f"{path.name}:\n{text}")
