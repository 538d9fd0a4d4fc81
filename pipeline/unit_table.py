"""Records of units as a flat table, and back: nested fields are JSON text, failures columns."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.coverage import missing_blocks
from pipeline.schema import UNITS_SCHEMA, UnitRecord
from pipeline.shard_file import ShardName
from tasks.block import Block

RECORD_SCHEMA = pa.schema([field for field in UNITS_SCHEMA if field.name != "superseded"])
_JSON_FIELDS = ("versions", "self_test", "artifacts", "pinned")
_FAILURE = "failure_"


def record_table(records: Iterable[UnitRecord]) -> pa.Table:
    """Records as a table of ``RECORD_SCHEMA``."""
    lines = []
    for record in records:
        line = record.model_dump(exclude={"failure"})
        for name in _JSON_FIELDS:
            line[name] = None if line[name] is None else json.dumps(line[name], sort_keys=True)
        failure = record.failure.model_dump(by_alias=True) if record.failure else {}
        lines.append(line | {f"{_FAILURE}{name}": text for name, text in failure.items()})
    return pa.Table.from_pylist(lines, schema=RECORD_SCHEMA)


def records_of(table: pa.Table) -> list[UnitRecord]:
    """The records that ``record_table`` made a table of."""
    return [_record(line) for line in table.to_pylist()]


def names_of(records: pa.Table) -> list[ShardName]:
    """The names of these units."""
    columns = ("spec_key", "start", "stop", "generation", "draw_start", "draw_stop", "status")
    return [
        ShardName(key, start, stop, generation if status == "failed" else None, *draws)
        for key, start, stop, generation, *draws, status in zip(
            *(records[name].to_pylist() for name in columns), strict=True
        )
    ]


def units_table(records: pa.Table) -> pa.Table:
    """The table ``units`` of a run: records with a mark on failures that were made up for.

    ``superseded`` marks failures whose whole range was done, or failed again, later.
    """
    column = pa.array(_superseded(records), type=pa.bool_())
    return records.append_column("superseded", column).select(UNITS_SCHEMA.names)


def _record(line: dict[str, Any]) -> UnitRecord:
    fields = {name: value for name, value in line.items() if not name.startswith(_FAILURE)}
    for name in _JSON_FIELDS:
        fields[name] = None if fields[name] is None else json.loads(fields[name])
    failure = {
        name.removeprefix(_FAILURE): value
        for name, value in line.items()
        if name.startswith(_FAILURE)
    }
    if failure["class"] is not None:
        fields["failure"] = failure
    return UnitRecord.model_validate(fields)


def _superseded(records: pa.Table) -> list[bool]:
    """Which units are failures that later or successful units of the same spec make up for."""
    result = [False] * len(records)
    failed = np.flatnonzero(np.array(records["status"].to_pylist(), dtype=object) == "failed")
    if not failed.size:
        return result
    # Only specs with failures matter, and they are few.
    spec_keys = records["spec_key"].to_pylist()
    wanted = {spec_keys[place] for place in failed.tolist()}
    places: dict[str, list[int]] = defaultdict(list)
    for place, key in enumerate(spec_keys):
        if key in wanted:
            places[key].append(place)
    for chosen in places.values():
        lines = records.take(chosen).select(_AGE).to_pylist()
        for place, made_up in zip(chosen, _made_up_for(lines), strict=True):
            result[place] = made_up
    return result


_AGE = ["start", "stop", "draw_start", "draw_stop", "status", "finished_at", "generation"]


def _made_up_for(lines: Sequence[dict[str, Any]]) -> list[bool]:
    blocks = [
        Block(range(u["start"], u["stop"]), range(u["draw_start"], u["draw_stop"])) for u in lines
    ]
    ages = [(u["finished_at"], u["generation"]) for u in lines]
    is_ok = [u["status"] == "ok" for u in lines]
    start, stop = np.array([(u["start"], u["stop"]) for u in lines]).T

    def is_made_up_for(place: int) -> bool:
        block = blocks[place]
        near = np.flatnonzero((start < block.samples.stop) & (stop > block.samples.start))
        later = (blocks[i] for i in near.tolist() if is_ok[i] or ages[i] > ages[place])
        return not missing_blocks(block, later)

    return [not ok and is_made_up_for(place) for place, ok in enumerate(is_ok)]
