"""Many units that cost nothing: what planning, launching, resuming and reading take by themselves.

Each part has a process of its own, so that memory is that part's. ``planned`` plans a million
units of which half are done, over few specs and over many. ``launched`` runs units to the end,
reads them by the commands before and after ``compact``, then deletes every second one, starts the
launch again, kills it by SIGKILL after its first unit and takes the time of the next one.

Units write their shards with fsync; what that takes here is beside them as ``publish``.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from many_units import many_units, pretend_done, register
from populations import Quiet
from rich.table import Table

from pipeline.frozen import freeze, thaw
from pipeline.plan import make_plan
from pipeline.progress import plan_standing
from pipeline.run import execute, open_run, prepare, start_run
from pipeline.shards import list_shards
from pipeline.standing import standing
from pipeline.store import Store, open_store

# Workers of every executor find the measurement of ``many_units`` by its name.
_TESTS = str(Path(__file__).parents[1])
if _TESTS not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [_TESTS, str(Path(_TESTS).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )

Name = Literal["inline", "local"]

# By executor: numbers of units to launch.
LAUNCHED: dict[Name, tuple[int, ...]] = {"inline": (10_000, 100_000), "local": (10_000,)}
UNITS_PER_CHECKPOINT = 500  # the test images of digits
# Checkpoints, measurements, samples and draws of the plans.
PLANNED = {
    "10 specs": (10, 1, 500, 200),
    "10,000 specs": (1_000, 10, 100, 1),
    "100,000 specs": (10_000, 10, 10, 1),
}
PUBLISHED = 300  # objects for the store's own rate


def run(
    launched: dict[Name, tuple[int, ...]] | None = None,
    planned: dict[str, tuple[int, int, int, int]] | None = None,
) -> list[dict[str, Any]]:
    """Plan, launch, read, kill and resume.

    Returns:
        One dictionary per plan (``part`` is ``"plan"``) and launch (``"launch"``). Times are wall
        seconds, ``bytes`` are peak memory of the process.
    """
    rows = [_apart(_planned, name, *sizes) for name, sizes in (planned or PLANNED).items()]
    for executor, numbers in (launched or LAUNCHED).items():
        for units in numbers:
            with tempfile.TemporaryDirectory(prefix="flatcensus-bench-") as folder:
                row = _apart(_launched, f"{folder}/whole", executor, units)
                row |= _read(Path(folder) / "whole", "before")
                # Links instead of copies: nothing that is linked is ever changed in place.
                shutil.copytree(f"{folder}/whole", f"{folder}/half", copy_function=os.link)
                row |= _apart(_compacted, f"{folder}/whole")
                row |= _read(Path(folder) / "whole", "after")
                row |= _killed_and_resumed(Path(folder) / "half", executor)
                rows.append(row)
    return rows


def growth(rows: list[dict[str, Any]], key: str) -> float:
    """Exponent of a time in the number of units, from the smallest to the largest launch inline."""
    found = sorted((r["units"], r[key]) for r in rows if r.get("executor") == "inline")
    (few, first), (many, last) = found[0], found[-1]
    return math.log(last / first) / math.log(many / few)


def table(rows: list[dict[str, Any]]) -> Table:
    """One column per plan and launch."""
    shown = Table("", title="Scale")
    for row in rows:
        name = row.get("specs") or row["executor"]
        shown.add_column(f"{row['part']}, {name}, {row['units']:,} units", justify="right")
    for key in dict.fromkeys(key for row in rows for key in row):
        if key in ("part", "specs", "executor", "units"):
            continue
        unit, factor = ("MB", 1e-6) if "bytes" in key else ("s", 1.0)
        if key in PER_UNIT:
            unit, factor = "ms", 1e3
        cells = (f"{factor * row[key]:.3g}" if key in row else "" for row in rows)
        shown.add_row(f"{key.replace('_', ' ')}, {unit}", *cells)
    return shown


PER_UNIT = ("overhead_per_unit", "driver_cpu_per_unit", "publish")


def _apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_knowing, function, *arguments).result()


def _knowing(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function where the measurement is known."""
    register()
    return function(*arguments)


def _planned(name: str, checkpoints: int, measurements: int, samples: int, draws: int) -> dict:
    """Plans of a run of which every second spec, or every second unit of few, is done."""
    with tempfile.TemporaryDirectory(prefix="flatcensus-bench-") as folder:
        made = many_units(
            Path(folder), checkpoints=checkpoints, measurements=measurements, samples=samples,
            draws=draws,
        )  # fmt: skip
        groups = list(made.plan().units.groups)
        done = pretend_done(made, groups[::2])
        row = _apart(_plan_again, folder)
        assert row["units"] == sum(map(len, groups)) - done
        return {"part": "plan", "specs": name, **row, "units": row["units"] + done}


def _plan_again(folder: str) -> dict[str, Any]:
    """Everything that a launch which goes on does before its first unit, and what status does."""
    found: dict[str, Any] = {"bytes_at_start": _peak()}
    made = start_run(Path(folder) / "many.toml", f"{folder}/run")
    with _timed(found, "resolve"):
        resolved = prepare(made)
    with _timed(found, "plan"):
        plan = make_plan(made.manifest, made.store, resolved=resolved)
        found["units"] = len(plan.units)
        assert plan.predicted_seconds > 0
    with _timed(found, "first_unit"):
        next(iter(plan.units))
    with _timed(found, "freeze"):
        freeze(resolved, made.manifest, made.store)
    found["bytes"] = _peak()
    del resolved, plan
    with _timed(found, "recall"):
        recalled = thaw(made.manifest, made.store)
        known = plan_standing(make_plan(made.manifest, made.store, resolved=recalled))
    with _timed(found, "standing"):
        assert standing(made.store) == known
    return found


def _launched(folder: str, executor: Name, units: int) -> dict[str, Any]:
    """One launch from nothing; afterwards nothing is to do."""
    torch.set_num_threads(1)
    samples = min(units, UNITS_PER_CHECKPOINT)
    made = many_units(Path(folder), checkpoints=units // samples, samples=samples)
    row: dict[str, Any] = {"part": "launch", "executor": executor, "units": units}
    row["publish"] = _publish_seconds(made.store)
    cpu = time.process_time()
    with _timed(row, "launch"):
        result = execute(made, Quiet(), on=executor)
    if (result.committed, result.failed, result.lost) != (units, 0, 0):
        raise RuntimeError(f"the benchmark's launch did not run smoothly: {result}")
    if executor != "inline":  # inline, the driver's time is the units' time
        row["driver_cpu_per_unit"] = (time.process_time() - cpu) / units
    row["driver_bytes"] = _peak()
    with _timed(row, "launch_with_nothing_to_do"):
        execute(made, Quiet(), on=executor)
    with _timed(row, "reduce"):  # unpublished, or it would pack the shards
        _, tables = made.reduce(publish=False)
    slots = 1 if executor == "inline" else os.cpu_count() or 1
    begun, ended = tables.units["started_at"].min(), tables.units["finished_at"].max()
    working = _seconds(ended) - _seconds(begun)
    row["overhead_per_unit"] = (slots * working - tables.units["seconds"].sum()) / units
    row |= {"reduce_bytes": _peak()}
    return row


def _compacted(folder: str) -> dict[str, Any]:
    from pipeline.compact import compact

    row: dict[str, Any] = {}
    made = open_run(f"{folder}/run")
    with _timed(row, "compact"):
        compact(made.store)
    row["compact_bytes"] = _peak()
    with _timed(row, "reduce_and_publish"):
        made.reduce()
    return row


def _publish_seconds(store: Store) -> float:
    """What the store takes for one new object of the size of a small shard."""
    started, content = time.perf_counter(), bytes(8_000)
    for number in range(PUBLISHED):
        store.put_new(f"probe/{number}", content)
    elapsed = time.perf_counter() - started
    for number in range(PUBLISHED):
        store.delete(f"probe/{number}")
    return elapsed / PUBLISHED


def _read(folder: Path, when: str) -> dict[str, Any]:
    """Commands on the run, each in a fresh process, imports included."""
    found = {}
    for name, arguments in (
        ("status", ("status", folder / "run")),
        ("query", ("query", folder / "run", "select count(*), avg(value) from measurements")),
    ):
        started = time.perf_counter()
        program = [*_PROGRAM, "command", *map(str, arguments), "--json"]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found[f"{name}_{when}_compact"] = time.perf_counter() - started
    return found


def _killed_and_resumed(folder: Path, executor: Name) -> dict[str, Any]:
    """Seconds from a driver's death to the first unit of the next one, by step; half is done."""
    store = open_store(folder / "run")
    for names in list_shards(store).values():
        for name in names[::2]:
            store.delete(name.key)
    arguments = ["launch", str(folder / "many.toml"), str(folder / "run"), executor]
    with _process(arguments) as lines:
        next(line for line in lines if line["step"] == "first unit")
    killed = time.time()  # the process is dead when it is left
    with _process(arguments) as lines:
        found, before = {}, killed
        for line in lines:
            found[f"restart_{line['step'].replace(' ', '_')}"] = line["time"] - before
            before = line["time"]
            if line["step"] == "first unit":
                break
    return {"restart": before - killed, **found}


@contextmanager
def _process(arguments: list[str]) -> Iterator[Iterator[dict[str, Any]]]:
    """The lines of a launch, which is killed in the end."""
    program = subprocess.Popen(
        [*_PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert program.stdout is not None
    try:
        yield (json.loads(line) for line in program.stdout)
    finally:
        program.send_signal(signal.SIGKILL)
        program.wait()
        program.stdout.close()


_PROGRAM = (sys.executable, "-m", "tests.benchmarks.scale_process")


@contextmanager
def _timed(found: dict[str, Any], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found[name] = time.perf_counter() - started


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
