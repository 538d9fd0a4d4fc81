"""What a plan says, as tables: state and reason of each spec, totals."""

from __future__ import annotations

from collections import Counter, defaultdict

import pandas as pd

from pipeline.labels import counted
from pipeline.plan import Plan
from pipeline.plan_summary import measurement_name
from pipeline.standing import STATES, Absent, Standing
from pipeline.units import UnitGroup


def plan_table(plan: Plan) -> pd.DataFrame:
    """One line per spec: what it would do and why, and what to know before it does."""
    units: dict[str, list[UnitGroup]] = defaultdict(list)
    for group in plan.units.groups:
        units[group.spec.key].append(group)
    lines = [
        {
            "checkpoint": item.spec.checkpoint,
            "measurement": measurement_name(item.spec),
            "state": item.state,
            "units": sum(map(len, units[item.spec.key])),
            "seconds": round(sum(g.predicted_seconds for g in units[item.spec.key]), 1),
            "reason": item.reason,
            "note": "" if item.state == "done" else item.spec.note,
        }
        for item in plan.specs
    ]
    return pd.DataFrame(
        lines, columns=["checkpoint", "measurement", "state", "units", "seconds", "reason", "note"]
    )


def numbered_notes(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A plan's table with numbers for its notes, and what they stand for, equal notes once.

    Returns:
        The table, without the column if there is no note, and one line per note, such as
        ``note 1 (nmls, 200 checkpoints): ...``.
    """
    counts = Counter(
        (record["measurement"], record["note"])
        for record in table.to_dict("records")
        if record["note"]
    )
    if not counts:
        return table.drop(columns="note"), []
    numbers = {key: str(number) for number, key in enumerate(counts, start=1)}
    keys = zip(table["measurement"], table["note"], strict=True)
    return table.assign(note=[numbers.get(key, "") for key in keys]), [
        f"note {numbers[name, note]} ({name}, {counted(count, 'checkpoint')}): {note}"
        for (name, note), count in counts.items()
    ]


def plan_standing(plan: Plan) -> Standing:
    """Where a run stands by its plan."""
    specs: dict[str, dict[str, int]] = {}
    for item in plan.specs:
        states = specs.setdefault(measurement_name(item.spec), dict.fromkeys(STATES, 0))
        states[item.state] += 1
    units: Counter[str] = Counter()
    for group in plan.units.groups:
        units[measurement_name(group.spec)] += len(group)
    absent = tuple(Absent(item.checkpoint, item.reason) for item in plan.unresolved)
    return Standing(specs, dict(units), len(plan.waiting), absent, plan.num_failed)
