"""What is done, to do and failed, from the run folder alone and without loading the mathematics.

The same as a plan of the recalled specs says, which takes seconds longer to import than to make.
Where the folder does not hold all that this needs (it was launched by other code, another manifest
or before a training ended, or a decision about a stage is still to be made), a plan must say it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.coverage import missing_blocks, without
from pipeline.decisions import Decisions, recall_decisions
from pipeline.grid import shapes
from pipeline.sealed import FROZEN, unseal
from pipeline.shards import ShardName, any_done, list_shards
from pipeline.store import MissingKeyError, Store
from pipeline.versions import code_version
from tasks.block import Block

MANIFEST = "manifest.toml"
STATES = ("done", "todo", "failed")


class Absent(NamedTuple):
    """A checkpoint that cannot be had."""

    checkpoint: str
    reason: str


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        specs: Specs by measurement and state.
        units: Units to do by measurement.
        num_waiting: Checkpoints that are not trained yet.
        unresolved: Checkpoints that cannot be had.
        num_failed: Failed ranges and checkpoints that cannot be had.
    """

    specs: dict[str, dict[str, int]]
    units: dict[str, int]
    num_waiting: int
    unresolved: tuple[Absent, ...]
    num_failed: int

    @property
    def num_units(self) -> int:
        """Units to do."""
        return sum(self.units.values())

    def lines(self) -> list[dict[str, Any]]:
        """One line per measurement: how many checkpoints are done, to do, failed."""
        lines = [
            {"measurement": name, **states, "waiting": 0, "units_todo": self.units.get(name, 0)}
            for name, states in self.specs.items()
        ]
        nothing = dict.fromkeys((*STATES, "waiting", "units_todo"), 0)
        if self.num_waiting:
            lines.append({"measurement": "(after training)"} | nothing
                         | {"waiting": self.num_waiting})  # fmt: skip
        if self.unresolved:
            lines.append({"measurement": "(checkpoints not to be had)"} | nothing
                         | {"failed": len(self.unresolved)})  # fmt: skip
        return lines


LINE_COLUMNS = ("measurement", *STATES, "waiting", "units_todo")


def standing(store: Store) -> Standing | None:
    """Where a run stands, or None where only a plan can say it."""
    try:
        digest = hashlib.sha256(store.get(MANIFEST)).hexdigest()
        known = unseal(store.get(FROZEN))
        if (known["manifest"], known["code"]) != (digest, code_version()):
            return None
        present = list_shards(store)
        if any_done(present, (record["spec_key"] for record in known["untrained"])):
            return None
        return _standing(known, present, recall_decisions(store))
    except (MissingKeyError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # damaged or of an older flatcensus: a plan reads it or says what is wrong


class _UndecidedError(KeyError):
    """A stage is complete and nobody has looked whether it suffices."""


def _standing(
    known: dict[str, Any], present: dict[str, list[ShardName]], decisions: Decisions
) -> Standing:
    place = {name: number for number, name in enumerate(known["columns"])}
    values = known["values"]
    specs: dict[str, dict[str, int]] = {}
    units: dict[str, int] = defaultdict(int)
    planned: dict[str, list[Block]] = defaultdict(list)
    stages: dict[int, list[Block]] = {}
    num_failed = len(known["unresolved"])
    for record in known["specs"]:
        key, label = record[place["key"]], values[record[place["label"]]]
        name = values[record[place["metric"]]] + (f"@{label}" if label else "")
        where = record[place["stages"]]
        if where not in stages:
            stages[where] = [Block(range(a, b), range(c, d)) for a, b, c, d in values[where]]
        settings, size = (values[record[place[part]]] for part in ("settings", "unit size"))
        names = present.get(key, ())
        wanted, todo, failed = _todo(key, settings, stages[where], names, decisions)
        states = specs.setdefault(name, dict.fromkeys(STATES, 0))
        states["todo" if todo else "failed" if failed else "done"] += 1
        num_failed += len(failed)
        # Equal networks, or twins that differ in coverage alone, share their units.
        new = tuple(without(todo, planned[key])) if todo else ()
        if new:
            units[name] += sum(shapes(new, size, wanted).values())
        planned[key] += todo
    absent = tuple(Absent(r["checkpoint"], r["reason"]) for r in known["unresolved"])
    return Standing(specs, dict(units), len(known["untrained"]), absent, num_failed)


def _todo(
    key: str,
    settings: str,
    stages: Sequence[Block],
    names: Sequence[ShardName],
    decisions: Decisions,
) -> tuple[Block, list[Block], list[Block]]:
    """What a spec wants now, what of it is to do, and what has failed."""
    have = [name.block for name in names if name.generation is None]
    for number, wanted in enumerate(stages):
        lacking = missing_blocks(wanted, have)
        if lacking:
            tried = [name.block for name in names if name.generation is not None]
            todo = without(lacking, tried) if tried else lacking
            return wanted, todo, without(lacking, todo) if tried else []
        if number == len(stages) - 1:
            break
        if (key, settings, number) not in decisions:
            raise _UndecidedError(key)
        if decisions[key, settings, number]:
            return wanted, [], []
    return stages[-1], [], []
