"""The plan: what is wanted minus what has a shard, cut into units, each with its reason.

A plan is a pure function of the manifest and of the shards in the store. Sequential measurements
grow stage by stage: when a stage's rows are complete, its rows decide whether the next is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.calibration import Calibration, calibrate, finished_units
from pipeline.cost import nominal_rates, slot_device, slot_share
from pipeline.coverage import missing_blocks, without
from pipeline.decisions import Decisions
from pipeline.entries import Manifest, ResourceSpec
from pipeline.hub_file import HubFile
from pipeline.resolve import resolve
from pipeline.shards import Quarantined, ShardName, list_shards
from pipeline.specs import Resolved, Spec, Unresolved
from pipeline.store import Store
from pipeline.tables import stage_columns
from pipeline.units import Terms, UnitGroup, Units
from tasks.block import Block

State = Literal["done", "todo", "failed"]


@dataclass(frozen=True, slots=True)
class SpecPlan:
    """One spec with its state: which block it wants now, what is to do, what failed."""

    spec: Spec
    wanted: Block
    todo: tuple[Block, ...]
    failed: tuple[Block, ...]
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
    units: Units
    unresolved: tuple[Unresolved, ...]
    waiting: tuple[str, ...]
    stale: tuple[str, ...]
    calibration: Calibration
    files: Mapping[str, tuple[HubFile, ...]] = field(default_factory=dict)

    @property
    def predicted_seconds(self) -> float:
        """Sum over the units to do, in seconds of one slot."""
        return self.units.predicted_seconds

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
    decisions: Decisions | None = None,
) -> Plan:
    """Compare what the manifest wants with what the store holds.

    Args:
        manifest: What to audit.
        store: The run folder.
        resolved: The manifest's specs, if already resolved and unchanged.
        retry_failed: Treat failed ranges as to do again.
        decisions: Memory of ``finished``; filled in, so that a scheduler that plans repeatedly
            reads each complete stage once.
    """
    resolved = resolved or resolve(manifest, store)
    decisions = {} if decisions is None else decisions
    present = list_shards(store)
    damaged: list[Quarantined] = []
    specs: list[SpecPlan] = []
    for spec in resolved.specs:
        names = present.get(spec.key, ())
        specs.append(_spec_plan(spec, names, store, retry_failed, decisions, damaged))
        if damaged:  # what was set aside is to do again: the listing is another one now
            return make_plan(
                manifest, store, resolved=resolved, retry_failed=retry_failed, decisions=decisions
            )
    calibration = _calibration(resolved, store, present, manifest.resources)
    terms = Terms(
        manifest.seed, store.uri, manifest.resources, calibration.rates, manifest.itemsize
    )
    planned_blocks: dict[str, list[Block]] = {}
    groups: list[UnitGroup] = []
    for item in specs:
        # Equal networks, or twins that differ in coverage alone, share their units.
        known = planned_blocks.setdefault(item.spec.key, [])
        if todo := without(item.todo, known):
            generation = _generation(present.get(item.spec.key, ()))
            groups.append(terms.group(item.spec, todo, item.wanted, generation=generation))
        known += item.todo
    planned = {item.spec.key for item in specs}
    return Plan(
        specs=tuple(specs),
        units=Units(tuple(groups)),
        unresolved=resolved.unresolved,
        waiting=tuple(ref.entry.name for ref in resolved.untrained),
        stale=tuple(sorted(key for key in present if key not in planned)),
        calibration=calibration,
        files=resolved.files,
    )


def _calibration(
    resolved: Resolved,
    store: Store,
    present: Mapping[str, Sequence[ShardName]],
    resources: ResourceSpec,
) -> Calibration:
    device = slot_device(resources)
    found = finished_units(
        store, {spec.key: spec for spec in resolved.specs}, present,
        is_gpu=device.is_gpu, share=slot_share(resources),
    )  # fmt: skip
    low, middle, high = device.efficiency
    spread = max(middle / low, high / middle)
    return calibrate(found, nominal_rates(device), spread=spread)


def _spec_plan(
    spec: Spec,
    names: Sequence[ShardName],
    store: Store,
    retry_failed: bool,
    decisions: Decisions,
    damaged: list[Quarantined],
) -> SpecPlan:
    have = [name.block for name in names if name.generation is None]
    stage, wanted, lacking = _stage(spec, have, store, decisions, damaged)
    if not lacking:
        return SpecPlan(spec, wanted, (), (), stage, "complete")
    todo = lacking
    if not retry_failed and len(have) < len(names):
        todo = without(lacking, [name.block for name in names if name.generation is not None])
    failed = [] if todo is lacking else without(lacking, todo)
    return SpecPlan(
        spec, wanted, tuple(todo), tuple(failed), stage, _reason(stage, have, failed, retry_failed)
    )


def _stage(
    spec: Spec,
    have: Sequence[Block],
    store: Store,
    decisions: Decisions,
    damaged: list[Quarantined],
) -> tuple[int, Block, list[Block]]:
    """The stage a spec is in, its block, and what that lacks.

    Rows beyond it (of a larger budget) are not used. Shards found damaged are set aside and join
    ``damaged``; no decision rests on what is left.
    """
    stages = spec.stages()
    for number, block in enumerate(stages):
        lacking = missing_blocks(block, have)
        if lacking or number == len(stages) - 1:
            return number, block, lacking
        assert spec.entry is not None
        memo = (spec.key, spec.entry.measurement.model_dump_json(), number)
        if memo not in decisions:
            known = len(damaged)
            rows = stage_columns(store, spec.key, block, damaged)
            if len(damaged) > known:
                return number, block, lacking
            decisions[memo] = spec.entry.measurement.finished(rows)
        if decisions[memo]:
            return number, block, lacking
    raise AssertionError("a measurement has at least one stage")


def _reason(stage: int, have: Sequence[Block], failed: Sequence[Block], retry_failed: bool) -> str:
    if failed:
        return "failed before; `flatcensus resume` tries again"
    if retry_failed and have:
        return "missing samples, failed ones again"
    if stage > 0:
        return f"error bar above its target after look {stage}"
    return "some samples missing" if have else "no result with these settings"


def _generation(names: Sequence[ShardName]) -> int:
    """Number of the next failure record of a spec."""
    return 1 + max((n.generation for n in names if n.generation is not None), default=-1)
