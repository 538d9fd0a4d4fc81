"""What a plan will take: time, memory, downloads, and what nobody can predict.

Seconds are predicted per unit (pipeline/cost.py) at rates of the manifest's device class, or of the
run's own machines once units have finished on them (pipeline/calibration.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from pipeline.cost import load_seconds, set_up_work, slot_device, slot_share, unit_bytes
from pipeline.durations import duration, size
from pipeline.entries import ResourceSpec
from pipeline.labels import counted
from pipeline.plan import Plan, SpecPlan
from pipeline.specs import Spec
from pipeline.units import UnitGroup

USABLE = 0.9  # share of a device's memory that fragmentation leaves; chosen


@dataclass(frozen=True)
class Peak:
    """The hungriest unit: its name, its memory, and the batch that fits the device."""

    unit: str
    num_bytes: float
    device_bytes: float | None
    batch_size: int
    fitting_batch_size: int | None

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the device's memory is not known."""
        return None if self.device_bytes is None else self.num_bytes <= self.device_bytes


@dataclass(frozen=True)
class CostSummary:
    """Totals of a plan. Ranges are low, middle, high.

    Attributes:
        device: What slots are taken for, and on what that rests.
        units: Units to do.
        slot_seconds: Time of one slot that does everything, loading included.
        device_hours: Hours of CPU cores or GPUs.
        device_unit: ``"CPU-hours"`` or ``"GPU-hours"``.
        wall_seconds: Elapsed time, where the manifest says how many slots there are at most.
        load_seconds: Part of ``slot_seconds`` for loading networks and testing them.
        peak: The hungriest unit, None if nothing is to do.
        download_bytes: Weights to fetch.
        downloads_estimated: Checkpoints whose file size is estimated from their parameters.
        unpredictable: What these numbers leave out, one sentence each.
    """

    device: str
    units: int
    slot_seconds: tuple[float, float, float]
    device_hours: tuple[float, float, float]
    device_unit: str
    wall_seconds: tuple[float, float, float] | None
    load_seconds: float
    peak: Peak | None
    download_bytes: float
    downloads_estimated: int
    unpredictable: tuple[str, ...]


def summarize_cost(
    plan: Plan, resources: ResourceSpec, *, itemsize: int, file_sizes: Mapping[str, int]
) -> CostSummary:
    """Add up a plan.

    Args:
        plan: What is to do.
        resources: The manifest's slots.
        itemsize: Bytes of a number in the manifest's ``dtype``.
        file_sizes: Bytes of weights files by checkpoint, where a lock knows them.
    """
    device, share, rates = slot_device(resources), slot_share(resources), plan.calibration.rates
    todo = [item for item in plan.specs if item.todo]
    loading = sum(load_seconds(s) for s in _first_of_each(todo, tested=False))
    tested = _first_of_each(todo, tested=True)
    loading += sum(rates.seconds(set_up_work(spec), share=share) for spec in tested)
    seconds = plan.calibration.range(plan.predicted_seconds + loading)
    devices = (resources.num_gpus or resources.num_cpus) / 3600
    hubs = {s.checkpoint: s for i in todo if (s := i.spec).ref and s.ref.source == "timm"}
    known = plan.calibration.num_units
    basis = (
        f"calibrated on {counted(known, 'finished unit')} of "
        f"{counted(plan.calibration.num_networks, 'network')}"
        if known
        else device.source
    )
    return CostSummary(
        device=f"{device.title} ({basis})",
        units=len(plan.units),
        slot_seconds=seconds,
        device_hours=_each(seconds, devices),
        device_unit="GPU-hours" if device.is_gpu else "CPU-hours",
        wall_seconds=_each(seconds, 1 / resources.max_slots) if resources.max_slots else None,
        load_seconds=loading,
        peak=_peak(todo, resources, itemsize),
        download_bytes=sum(
            file_sizes.get(name, spec.network.weight_bytes) for name, spec in hubs.items()
        ),
        downloads_estimated=len(hubs.keys() - file_sizes.keys()),
        unpredictable=tuple(_unpredictable(plan, todo, is_measured=bool(known))),
    )


def cost_lines(cost: CostSummary) -> list[str]:
    """The summary as sentences."""
    low, middle, high = cost.device_hours
    lines = [
        f"{counted(cost.units, 'unit')} to do, about {duration(cost.slot_seconds[1])} of one slot "
        f"({duration(cost.slot_seconds[0])} to {duration(cost.slot_seconds[2])}), "
        f"{duration(cost.load_seconds)} of it to load and test networks",
        f"device: {cost.device}: {middle:.3g} {cost.device_unit} ({low:.2g} to {high:.2g})",
    ]
    if cost.wall_seconds:
        low, middle, high = map(duration, cost.wall_seconds)
        lines.append(f"elapsed: about {middle} with all slots busy ({low} to {high})")
    if (peak := cost.peak) is not None:
        lines.append(_peak_line(peak))
    if cost.download_bytes:
        guess = f", {counted(cost.downloads_estimated, 'file')} estimated from parameters"
        guess = guess if cost.downloads_estimated else ""
        lines.append(f"weights to have: {size(cost.download_bytes)}{guess}")
    return [*lines, *(f"not predicted: {reason}" for reason in cost.unpredictable)]


def family_table(plan: Plan) -> pd.DataFrame:
    """One line per family and measurement: how many checkpoints, what is to do, predicted time."""
    units: dict[str, list[UnitGroup]] = defaultdict(list)
    for group in plan.units.groups:
        units[group.spec.key].append(group)
    groups: dict[tuple[str, str], list[SpecPlan]] = defaultdict(list)
    for item in plan.specs:
        groups[item.spec.family, measurement_name(item.spec)].append(item)
    lines = []
    for (family, measurement), items in sorted(groups.items()):
        todo = [g for key in dict.fromkeys(i.spec.key for i in items) for g in units[key]]
        states = Counter(item.state for item in items)
        lines.append(
            {
                "family": family, "measurement": measurement, "checkpoints": len(items),
                "done": states["done"], "todo": states["todo"], "failed": states["failed"],
                "units": sum(map(len, todo)),
                "seconds": round(sum(g.predicted_seconds for g in todo), 1),
                "longest_unit": round(max((g.longest_seconds for g in todo), default=0.0), 1),
            }
        )  # fmt: skip
    columns = ["family", "measurement", "checkpoints", "done", "todo", "failed", "units",
               "seconds", "longest_unit"]  # fmt: skip
    return pd.DataFrame(lines, columns=columns)


def measurement_name(spec: Spec) -> str:
    """Metric and label as tables show them."""
    return spec.metric + (f"@{spec.label}" if spec.label else "")


def _first_of_each(todo: Sequence[SpecPlan], *, tested: bool) -> list[Spec]:
    """One spec for each network that has to be loaded, or that has to pass the self-test."""
    found: dict[str, Spec] = {}
    for item in todo:
        if not tested or set_up_work(item.spec).flops:
            found.setdefault(item.spec.subject, item.spec)
    return list(found.values())


def _peak(todo: Sequence[SpecPlan], resources: ResourceSpec, itemsize: int) -> Peak | None:
    batch = resources.batch_size
    needs = ((unit_bytes(s, batch, itemsize), s) for s in (item.spec for item in todo))
    known = [(needed, spec) for needed, spec in needs if needed is not None]
    if not known:
        return None
    most, worst = max(known, key=lambda pair: pair[0])
    device = slot_device(resources).memory_bytes
    room = None if device is None else device * USABLE * slot_share(resources)
    fitting = None
    if room is not None:
        halves = [batch >> k for k in range(batch.bit_length())]
        fitting = next((b for b in halves if (unit_bytes(worst, b, itemsize) or 0) <= room), 0)
    name = f"{worst.checkpoint} {measurement_name(worst)}"
    return Peak(name, most, room, batch, fitting)


def _peak_line(peak: Peak) -> str:
    line = f"memory: {size(peak.num_bytes)} at most, {peak.unit}, batch_size = {peak.batch_size}"
    if peak.device_bytes is None:
        return line
    if peak.fits:
        return f"{line}; the device has {size(peak.device_bytes)} to use"
    advice = (
        f"batch_size = {peak.fitting_batch_size} fits (units that do not fit halve theirs)"
        if peak.fitting_batch_size
        else "not even one image fits: take a larger device for it"
    )
    return f"{line}; more than the {size(peak.device_bytes)} that the device has to use: {advice}"


def _unpredictable(plan: Plan, todo: Sequence[SpecPlan], *, is_measured: bool) -> list[str]:
    """What the totals do not hold."""
    found = []
    later = Counter(
        measurement_name(item.spec)
        for item in plan.specs
        if len(stages := item.spec.stages()) > 1 and item.todo and item.wanted != stages[-1]
    )
    for name, count in later.items():
        found.append(
            f"{name} beyond its present look, on {counted(count, 'checkpoint')}: its error bars "
            "decide how many draws follow"
        )
    if plan.waiting:
        found.append(f"measurements of {counted(len(plan.waiting), 'checkpoint')} not trained yet")
    if plan.unresolved:
        found.append(f"{counted(len(plan.unresolved), 'checkpoint')} that cannot be had")
    if todo and not is_measured:
        found.append("how fast your machines are: no unit has finished on them yet")
    return found


def _each(seconds: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    low, middle, high = seconds
    return low * factor, middle * factor, high * factor
