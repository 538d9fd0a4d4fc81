"""Whether a run that was attacked ended like the undisturbed one, and what that cost."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import pyarrow.parquet as pq

from campaigns.world import NUM_SAMPLES, NUM_UNITS, UNIT_SAMPLES, Attempt, World
from pipeline.shards import list_shards
from pipeline.store import open_store

TABLES = ("measurements", "summary", "layers", "bounds", "correlations", "matrix")
_ROW = ["spec_key", "quantity", "sample", "layer", "step"]


class Rows(NamedTuple):
    """Rows of ``measurements`` that are not there, and that are there too often."""

    lost: int
    duplicated: int


class Work(NamedTuple):
    """What an episode cost, in units.

    Attributes:
        recomputed: Finished although they had been finished before.
        lost: Begun and never finished.
    """

    recomputed: float
    lost: int


class Consequence(NamedTuple):
    """What came of one fault.

    Attributes:
        work: In vain.
        recovery_seconds: Until a unit was done that began after it; None if there was none.
        again_seconds: Until the last of the lost units was done; None if none was lost.
    """

    work: Work = Work(0, 0)
    recovery_seconds: float | None = None
    again_seconds: float | None = None


ALL_ROWS, NO_WORK, NOTHING = Rows(0, 0), Work(0, 0), Consequence()


def tables(world: World) -> dict[str, bytes]:
    """The published tables, as they are stored."""
    store = open_store(world.uri)
    keys = {name: f"tables/{name}.parquet" for name in TABLES}
    return {name: store.get(key) for name, key in keys.items() if store.exists(key)}


def rows(found: dict[str, bytes], expected: dict[str, bytes]) -> Rows:
    """Compare the rows of two runs by what they are about."""
    ours, theirs = _rows(found.get("measurements")), _rows(expected["measurements"])
    duplicated = sum(count - 1 for count in ours.values())
    return Rows(len(theirs.keys() - ours.keys()), duplicated)


def differences(world: World, expected: dict[str, bytes]) -> list[str]:
    """What is not as it would be without faults; empty if all is."""
    found, wrong = tables(world), []
    wrong += [f"table {name} differs" for name in TABLES if found.get(name) != expected[name]]
    covered = Counter(
        (key, sample)
        for key, names in list_shards(open_store(world.uri)).items()
        for name in names
        if name.generation is None
        for sample in range(name.start, name.stop)
    )
    measured = sum(1 for _, sample in covered if sample < NUM_SAMPLES)
    planned = NUM_UNITS * UNIT_SAMPLES + 1  # and the training
    if measured != planned:
        wrong.append(f"{measured} of {planned} samples have a result")
    wrong += [f"left behind: {path.relative_to(world.run)}" for path in world.leftovers()]
    return wrong


def work(attempts: Sequence[Attempt]) -> Work:
    """Count what was done in vain."""
    again = sum(_is_repeated(attempts))
    return Work(again, sum(a.ended is None for a in attempts))


def consequences(attempts: Sequence[Attempt], moments: Sequence[float]) -> list[Consequence]:
    """What came of each fault, by the time of it.

    A unit is lost to the fault that follows its begin, and repeated because of the one before it.
    """
    repeated, lost = [0.0] * len(moments), [0] * len(moments)
    waits = [_first_end(attempts, moment) for moment in moments]
    again: list[float | None] = [None] * len(moments)
    for attempt, share in zip(attempts, _is_repeated(attempts), strict=True):
        place = bisect(moments, attempt.began)
        if share and place:
            repeated[place - 1] += share
        if attempt.ended is None and moments:
            place = min(place, len(moments) - 1)
            lost[place] += 1
            wait = _first_end(attempts, moments[place], of=attempt)
            again[place] = max((x for x in (again[place], wait) if x is not None), default=None)
    return [
        Consequence(Work(*work), *seconds)
        for *work, seconds in zip(repeated, lost, zip(waits, again, strict=True), strict=True)
    ]


def _first_end(attempts: Sequence[Attempt], at: float, of: Attempt | None = None) -> float | None:
    """From a moment to the end of the first unit (or of this one) that began after it."""
    ends = [
        a.ended
        for a in attempts
        if a.ended is not None
        and a.began > at
        and (of is None or (a.unit == of.unit and a.samples[0] <= of.samples[0] < a.samples[1]))
    ]
    return min(ends) - at if ends else None


def _is_repeated(attempts: Sequence[Attempt]) -> list[float]:
    """Which share of each attempt's unit had been finished before."""
    known: set[tuple[str, int]] = set()
    shares = []
    for attempt in attempts:
        samples = {(attempt.unit, s) for s in range(*attempt.samples) if attempt.ended is not None}
        shares.append(len(samples & known) / UNIT_SAMPLES)
        known |= samples
    return shares


def _rows(table: bytes | None) -> Counter[tuple[object, ...]]:
    if table is None:
        return Counter()
    frame = pq.read_table(BytesIO(table)).to_pandas()
    return Counter(zip(*(frame[name].astype(object).fillna(-1) for name in _ROW), strict=True))
