"""The engine without the mathematics: seconds per unit and per checkpoint switch.

Real launches with real but tiny units: MLPs on digits, normalized_mls on 32 images a unit, one
slot. Each launch has a process of its own, so that its memory is the driver's alone.

``overhead_per_unit`` is the wall time between the first unit's start and the last one's end that
is not inside a unit (as its record states it), per unit; where there are several checkpoints it
includes their switches. ``gap`` is the median time between two units of one checkpoint: shard,
result, next unit. ``switch`` is what a gap takes longer when the checkpoint changes: the old child
ends, a new one is forked. ``loading`` is what the first unit of a checkpoint takes longer than
later ones: weights, images, self-test and whatever a fresh process does once; ``warm_load`` and
``warm_self_test`` are the first and third in a process that has done them before.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from populations import Quiet, save_mlp, write_manifest
from rich.table import Table

from pipeline.driver import launch
from pipeline.executor import Executor
from pipeline.run import Run, executor_opener, start_run
from pipeline.schema import UnitRecord
from pipeline.shards import read_shards
from pipeline.specs import Task
from pipeline.worker import Workbench
from tasks.self_test import self_test

UNITS = 200
CHECKPOINTS = (1, 20)
IMAGES_PER_UNIT = 32  # the smallest unit that normalized_mls allows
AVAILABLE = 1280  # training images of digits, in whole units
EXECUTORS: tuple[Literal["inline", "local"], ...] = ("inline", "local")


def run(units: int = UNITS, checkpoints: tuple[int, ...] = CHECKPOINTS) -> list[dict[str, Any]]:
    """Launch about ``units`` units over each number of checkpoints, inline and on local Ray.

    Returns:
        One dictionary per launch; times in seconds.
    """
    rows = []
    for executor in EXECUTORS:
        for number in checkpoints:
            # Spawned, because a fork would inherit this process's memory and threads.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                rows.append(pool.submit(_launch, executor, units, number).result())
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """One column per launch, times in milliseconds."""
    shown = Table("", title="Engine: one slot, units of about 10 ms")
    for row in rows:
        shown.add_column(f"{row['executor']}, {row['checkpoints']} checkpoints", justify="right")
    shown.add_row("units", *(f"{row['units']}" for row in rows))
    shown.add_row("units / s", *(f"{row['units_per_second']:.0f}" for row in rows))
    for key in _TIMES:
        name = key.replace("_", " ") + ", ms"
        shown.add_row(name, *(f"{1e3 * row[key]:.1f}" if key in row else "" for row in rows))
    shown.add_row("driver's memory, MB", *(f"{row['driver_bytes'] / 1e6:.0f}" for row in rows))
    return shown


_TIMES = (
    "wall", "startup", "first_child", "shutdown", "overhead_per_unit", "gap", "switch", "loading",
    "warm_load", "warm_self_test", "driver_cpu_per_unit", "plan", "reduce",
)  # fmt: skip


def _launch(executor: Literal["inline", "local"], units: int, checkpoints: int) -> dict[str, Any]:
    """One launch from nothing to reduced tables, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="flatcensus-bench-") as folder:
        run = _prepared(Path(folder), units, checkpoints)
        task = run.plan().units[0]
        opener, opened = executor_opener(run, executor), []

        def open_executor() -> Executor:
            opened.append((time.time(), time.process_time()))
            found = opener()
            opened.append((time.time(), time.process_time()))
            return found

        started, cpu = time.time(), time.process_time()
        result = launch(run.manifest, run.store, open_executor, Quiet())
        ended, cpu = time.time(), time.process_time() - cpu
        if result.failed or result.lost or result.retried:
            raise RuntimeError(f"the benchmark's launch did not run smoothly: {result}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        timeline = _timeline(run)
        startup, first_child = opened[1][0] - opened[0][0], timeline[0][0] - opened[1][0]
        working = timeline[-1][1] - timeline[0][0]
        inside = sum(unit.seconds for _, _, unit in timeline)
        row = {
            "executor": executor,
            "checkpoints": checkpoints,
            "units": len(timeline),
            "wall": ended - started,
            "units_per_second": len(timeline) / working,
            "startup": startup,
            "first_child": first_child,
            "shutdown": ended - timeline[-1][1],
            "overhead_per_unit": (working - inside) / (len(timeline) - 1),
            **_gaps(timeline),
            "driver_bytes": peak,
            "plan": _seconds(run.plan),
            "reduce": _seconds(run.reduce),
        }
        if executor != "inline":  # inline, the driver's time is the units' time
            row["driver_cpu_per_unit"] = (cpu - opened[1][1] + opened[0][1]) / len(timeline)
        return row | _loading_parts(task)


def _prepared(folder: Path, units: int, checkpoints: int) -> Run:
    """A run of about ``units`` units: as many images as there are, then several tolerances."""
    for seed in range(checkpoints):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    per_checkpoint = max(1, units // checkpoints)
    measurements = -(-per_checkpoint * IMAGES_PER_UNIT // AVAILABLE)
    samples = per_checkpoint // measurements * IMAGES_PER_UNIT
    entry = '[[measurements]]\nmetric = "normalized_mls"\nlabel = "t{0}"\ntolerance = 1e-{0}\n'
    path = write_manifest(
        folder / "engine.toml",
        samples=samples,
        measurements="".join(entry.format(2 + i) for i in range(measurements)),
        resources=f"unit_seconds = 0.001\nbatch_size = {IMAGES_PER_UNIT}\nmax_slots = 1",
    )
    path.write_text(path.read_text().replace("[data]\n", '[data]\nsplit = "train"\n'))
    return start_run(path, str(folder / "run"))


def _timeline(run: Run) -> list[tuple[float, float, UnitRecord]]:
    """Start and end of every unit, in order; of one slot, so nothing overlaps."""
    units = sorted((shard.unit for shard in read_shards(run.store)), key=lambda u: u.started_at)
    return [(_seconds_of(unit.started_at), _seconds_of(unit.finished_at), unit) for unit in units]


def _seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _gaps(timeline: list[tuple[float, float, UnitRecord]]) -> dict[str, float]:
    """Time between units of one checkpoint; what a change of checkpoint adds, and its loading."""
    within, across, first, later = [], [], [timeline[0][2].seconds], []
    for (_, end, unit), (start, _, following) in itertools.pairwise(timeline):
        same = unit.checkpoint == following.checkpoint
        (within if same else across).append(start - end)
        (later if same else first).append(following.seconds)
    gap = statistics.median(within)
    found = {"gap": gap, "loading": statistics.median(first) - statistics.median(later)}
    if across:
        found["switch"] = statistics.median(across) - gap
    return found


def _loading_parts(task: Task) -> dict[str, float]:
    """Loading a checkpoint with its images, and its self-test, for the second time in a process."""
    found = {}
    for _ in range(2):
        bench = Workbench()
        started = time.perf_counter()
        subject = bench.subject_of(task)
        loaded = time.perf_counter()
        self_test(subject)
        found = {"warm_load": loaded - started, "warm_self_test": time.perf_counter() - loaded}
    return found


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
