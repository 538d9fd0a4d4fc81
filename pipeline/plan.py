"""The plan: wanted ranges minus ranges with a shard, cut into units, each with its reason.

A plan is a pure function of the manifest and of the shards in the store. Sequential measurements
grow stage by stage: when a stage's rows are complete, its rows decide whether the next is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline import cost
from pipeline.manifest import Manifest
from pipeline.shards import ShardName, list_shards, missing
from pipeline.specs import Resolved, Spec, Task, Unresolved, resolve
from pipeline.store import Store
from pipeline.tables import stage_columns
from tasks.measurement import STRIDE, Columns, Ranges

State = Literal["done", "todo", "failed", "waiting"]


@dataclass(frozen=True)
class SpecPlan:
    """One spec with its state: which ranges it wants now, which are to do, which failed."""

    spec: Spec
    wanted: Ranges
    todo: Ranges
    failed: Ranges
    stage: int
    reason: str

    @property
    def state(self) -> State:
        """One word for tables."""
        if self.todo:
            return "todo"
        return "failed" if self.failed else "done"


@dataclass(frozen=True)
class Plan:
    """Everything a manifest wants, in the order of the manifest."""

    specs: tuple[SpecPlan, ...]
    units: tuple[Task, ...]
    unresolved: tuple[Unresolved, ...]
    waiting: tuple[str, ...]
    stale: tuple[str, ...]
    calibration: tuple[float, float, float]
    decisions: dict[tuple[str, int], bool] = field(repr=False, default_factory=dict)

    @property
    def predicted_seconds(self) -> float:
        """Sum over the units to do, in seconds of one slot, before calibration."""
        return sum(unit.predicted_seconds for unit in self.units)

    @property
    def num_failed(self) -> int:
        """Failed ranges and checkpoints that could not be resolved."""
        return sum(len(s.failed) for s in self.specs) + len(self.unresolved)


def make_plan(
    manifest: Manifest,
    store: Store,
    *,
    resolved: Resolved | None = None,
    retry_failed: bool = False,
    decisions: dict[tuple[str, int], bool] | None = None,
) -> Plan:
    """Compare what the manifest wants with what the store holds.

    Args:
        manifest: What to audit.
        store: The run folder.
        resolved: The manifest's specs, if already resolved and unchanged.
        retry_failed: Treat failed ranges as to do again.
        decisions: Memory of ``finished`` by (spec key, stage); filled in, so that a scheduler
            that plans repeatedly reads each complete stage once.
    """
    resolved = resolved or resolve(manifest, store)
    decisions = {} if decisions is None else decisions
    present = list_shards(store)
    specs = [
        _spec_plan(spec, present.get(spec.key, ()), store, retry_failed, decisions)
        for spec in resolved.specs
    ]
    units = tuple(unit for item in specs for unit in _units(item, manifest, store, present))
    planned = {item.spec.key for item in specs}
    return Plan(
        specs=tuple(specs),
        units=units,
        unresolved=resolved.unresolved,
        waiting=tuple(ref.entry.name for ref in resolved.untrained),
        stale=tuple(sorted(key for key in present if key not in planned)),
        calibration=(1 / 3, 1.0, 3.0),
        decisions=decisions,
    )


def final_stage(
    spec: Spec,
    names: Sequence[ShardName],
    store: Store,
    decisions: dict[tuple[str, int], bool] | None = None,
) -> tuple[int, Ranges, bool]:
    """The stage a spec is in: its number, its ranges, and whether they are all committed.

    The reducer and the planner agree through this one function: rows beyond the final stage (from
    an earlier, larger budget) are never used.
    """
    decisions = {} if decisions is None else decisions
    have = [range(name.start, name.stop) for name in names if name.generation is None]
    stages = spec.stages()
    for number, ranges in enumerate(stages):
        if missing(ranges, have):
            return number, ranges, False
        if number == len(stages) - 1:
            break
        if (spec.key, number) not in decisions:
            rows = stage_columns(store, spec.key, ranges)
            decisions[spec.key, number] = _finished(spec, rows)
        if decisions[spec.key, number]:
            return number, ranges, True
    return len(stages) - 1, stages[-1], True


def _finished(spec: Spec, rows: Columns) -> bool:
    assert spec.entry is not None
    return spec.entry.measurement.finished(rows)


def _spec_plan(
    spec: Spec,
    names: Sequence[ShardName],
    store: Store,
    retry_failed: bool,
    decisions: dict[tuple[str, int], bool],
) -> SpecPlan:
    number, ranges, complete = final_stage(spec, names, store, decisions)
    if complete:
        reason = "complete" if number == 0 else f"complete after look {number + 1}"
        return SpecPlan(spec, ranges, (), (), number, reason)
    have = [range(name.start, name.stop) for name in names if name.generation is None]
    failed_names = [range(n.start, n.stop) for n in names if n.generation is not None]
    lacking = missing(ranges, have)
    todo = tuple(lacking if retry_failed else missing(lacking, failed_names))
    failed = tuple(missing(lacking, todo)) if todo != tuple(lacking) else ()
    return SpecPlan(spec, ranges, todo, failed, number, _reason(number, have, failed, retry_failed))


def _reason(stage: int, have: list[range], failed: Ranges, retry_failed: bool) -> str:
    if failed:
        return "failed before; `flatcensus resume` tries again"
    if retry_failed and have:
        return "missing ranges, failed ones again"
    if stage > 0:
        return f"error bar above its target after look {stage}"
    return "some ranges missing" if have else "never measured with these settings"


def _units(
    item: SpecPlan, manifest: Manifest, store: Store, present: Mapping[str, Sequence[ShardName]]
) -> Iterator[Task]:
    spec, resources = item.spec, manifest.resources
    if not item.todo:
        return
    device: Literal["cpu", "cuda"] = "cuda" if resources.num_gpus > 0 else "cpu"
    per_index = cost.seconds_per_index(spec, device)
    size = unit_size(spec, per_index, resources.unit_seconds, resources.batch_size)
    generation = 1 + max(
        (n.generation for n in present.get(spec.key, ()) if n.generation is not None), default=-1
    )
    for gap in item.todo:
        for piece in split(gap, size):
            yield Task(
                spec=spec, start=piece.start, stop=piece.stop, seed=manifest.seed,
                store=str(store.uri), batch_size=resources.batch_size, threads=resources.num_cpus,
                device=device, predicted_seconds=per_index * len(piece), generation=generation,
            )  # fmt: skip


def unit_size(spec: Spec, per_index: float, unit_seconds: float, batch_size: int) -> int:
    """Indices per unit: about ``unit_seconds`` of work, whole batches and groups.

    Depends on the manifest and on nominal rates alone, never on what was measured, so that a
    resumed run cuts the same units.
    """
    align = 1 if spec.entry is None else math.lcm(spec.entry.measurement.alignment, batch_size)
    return max(align, int(unit_seconds / per_index) // align * align)


def split(gap: range, size: int) -> Iterator[range]:
    """Cut a range at multiples of ``size`` from the start of its draw, and at draw boundaries."""
    start = gap.start
    while start < gap.stop:
        draw = start // STRIDE
        base = draw * STRIDE
        stop = min(gap.stop, base + STRIDE, base + ((start - base) // size + 1) * size)
        yield range(start, stop)
        start = stop
