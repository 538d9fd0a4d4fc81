"""What a plan says, as tables: state and reason of each spec, totals, stale results."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import pandas as pd
import pydantic

from pipeline.labels import counted
from pipeline.plan import Plan
from pipeline.plan_summary import measurement_name
from pipeline.store import Store
from pipeline.units import UnitGroup

SPEC_FOLDER = "specs"


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


def status_table(plan: Plan) -> pd.DataFrame:
    """One line per measurement: how many checkpoints are done, to do, failed."""
    counts: dict[str, dict[str, int]] = {}
    for item in plan.specs:
        line = counts.setdefault(
            measurement_name(item.spec), dict.fromkeys(("done", "todo", "failed"), 0)
        )
        line[item.state] += 1
    units: Counter[str] = Counter()
    for group in plan.units.groups:
        units[measurement_name(group.spec)] += len(group)
    lines = [
        {"measurement": name, **line, "waiting": 0, "units_todo": units[name]}
        for name, line in counts.items()
    ]
    if plan.waiting:
        lines.append(
            {"measurement": "(after training)", "done": 0, "todo": 0, "failed": 0,
             "waiting": len(plan.waiting), "units_todo": 0}
        )  # fmt: skip
    if plan.unresolved:
        lines.append(
            {"measurement": "(checkpoints not to be had)", "done": 0, "todo": 0,
             "failed": len(plan.unresolved), "waiting": 0, "units_todo": 0}
        )  # fmt: skip
    return pd.DataFrame(
        lines, columns=["measurement", "done", "todo", "failed", "waiting", "units_todo"]
    )


def write_specs(plan: Plan, store: Store) -> None:
    """Keep what each key stands for, so that later plans can say what changed."""
    for item in plan.specs:
        spec, name = item.spec, f"{SPEC_FOLDER}/{item.spec.key}.json"
        if store.exists(name):
            continue
        known = {
            "checkpoint": spec.checkpoint, "metric": spec.metric, "label": spec.label,
            "fields": spec.fields,
        }  # fmt: skip
        store.put_new(name, json.dumps(known, indent=1).encode())


def stale_lines(plan: Plan, store: Store) -> list[str]:
    """For results that the manifest no longer asks for: which field differs from what it asks."""
    lines = []
    for key in plan.stale:
        old = _known_spec(store, key)
        if old is None:
            lines.append(f"shards/{key}: results of unknown settings, kept and not used")
            continue
        what = f"{old.checkpoint} {old.metric}" + (f"@{old.label}" if old.label else "")
        twins = [
            item.spec
            for item in plan.specs
            if (item.spec.checkpoint, item.spec.metric) == (old.checkpoint, old.metric)
        ]
        twin = next((t for t in twins if t.label == old.label), twins[0] if twins else None)
        changes = _differences(old.fields, twin.fields) if twin else ["no longer in the manifest"]
        lines.append(f"stale: {what} ({'; '.join(changes)}); kept and not used")
    return lines


class _KnownSpec(pydantic.BaseModel):
    """What ``write_specs`` keeps of a spec."""

    checkpoint: str
    metric: str
    label: str
    fields: dict[str, Any]


def _known_spec(store: Store, key: str) -> _KnownSpec | None:
    """What a key stands for; None if nobody wrote it down or the file is damaged."""
    name = f"{SPEC_FOLDER}/{key}.json"
    if not store.exists(name):
        return None
    try:
        return _KnownSpec.model_validate_json(store.get(name))
    except pydantic.ValidationError:
        return None


def _differences(old: object, new: object, path: str = "") -> list[str]:
    """``measurement.tolerance 0.001 -> 0.01`` for every field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            where = f"{path}.{key}" if path else str(key)
            found += _differences(old.get(key), new.get(key), where)
        return found
    return [] if old == new else [f"{path} {_short(old)} -> {_short(new)}"]


def _short(value: object) -> str:
    text = str(value)
    # Identities begin alike and end in what differs.
    return text if len(text) <= 40 else f"{text[:12]}...{text[-25:]}"
