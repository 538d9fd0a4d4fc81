"""Packs: many units in two Parquet files, and an index that vouches for every byte of them.

A pack is ``<id>-<time>-<nonce>.rows.parquet`` (the rows of its units, one unit after another),
``....units.parquet`` (one line per unit, in the same order) and ``<id>.json``, its index, published
last: a pack exists when its index does, and readers follow indexes only. The index names the units
and holds a SHA-256 of every row group and of both footers, so that damage costs the units of one
row group and no others. ``<id>`` is a digest of the content; the files' own names are never used
twice, so that nobody adopts what somebody else may be about to remove.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ShardError
from pipeline.schema import MEASUREMENT_SCHEMA, SCHEMA_VERSION
from pipeline.shard_file import Shard, ShardName, name_of
from pipeline.unit_table import RECORD_SCHEMA, record_table

FOLDER = "packs/"
PACK_VERSION = 1
# Chosen: a listing of a million units reads a hundred indexes; a pack is tens of megabytes.
MAX_UNITS, MAX_ROWS = 10_000, 2_000_000
# Chosen: what a damaged bit can cost, and still few enough groups to read all of them quickly.
GROUP_UNITS, GROUP_ROWS = 256, 100_000
TIME_FORMAT = "%Y%m%dT%H%M%S.%fZ"


class PackedFile(NamedTuple):
    """One of a pack's files: its key, and where its row groups and footer end, with digests."""

    key: str
    segments: tuple[tuple[int, str], ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.segments[-1][0]

    def damaged(self, data: bytes) -> list[int]:
        """Which segments are not what was written; the last one is the footer."""
        starts = (0, *(stop for stop, _ in self.segments))
        bad = [
            number
            for number, ((stop, digest), start) in enumerate(
                zip(self.segments, starts, strict=False)
            )
            if len(data) < stop or _sha256(memoryview(data)[start:stop]) != digest
        ]
        last = len(self.segments) - 1
        return [*bad, last] if len(data) > self.size and last not in bad else bad


@dataclass(frozen=True)
class Index:
    """What a pack holds. Names by spec are in the order of the files, specs too.

    Attributes:
        key: Of the index itself.
        names: The units by spec.
        groups: Units and rows of each group; a group without rows has no row group of rows.
        rows: The file of rows.
        units: The file of records.
    """

    key: str
    names: dict[str, tuple[ShardName, ...]]
    groups: tuple[tuple[int, int], ...]
    rows: PackedFile
    units: PackedFile

    @property
    def num_units(self) -> int:
        """Units in this pack."""
        return sum(units for units, _ in self.groups)

    @property
    def copy_key(self) -> str:
        """Where a copy of the index is."""
        return f"{self.rows.key.removesuffix('.rows.parquet')}.index.json"

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the pack's files and of the copy of its index."""
        return (self.rows.key, self.units.key, self.copy_key)

    @property
    def time(self) -> str:
        """When it was written, to put packs in order; by its writer's clock."""
        return self.rows.key.removeprefix(FOLDER).partition("-")[2]

    @cached_property
    def first_place(self) -> dict[str, int]:
        """The place in the files of each spec's first unit."""
        counts = [len(names) for names in self.names.values()]
        return dict(zip(self.names, itertools.accumulate([0, *counts]), strict=False))

    @cached_property
    def group_starts(self) -> list[int]:
        """The place of each group's first unit, and the number of units."""
        return list(itertools.accumulate((units for units, _ in self.groups), initial=0))

    def names_between(self, start: int, stop: int) -> list[ShardName]:
        """Names of the units at these places."""
        names = itertools.chain.from_iterable(self.names.values())
        return list(itertools.islice(names, start, stop))


class Packed(NamedTuple):
    """A pack to publish: its files in this order, then the index."""

    pack: Index
    files: dict[str, bytes]
    index_data: bytes


class PackWriter:
    """Collects units, which must come sorted, into one pack."""

    def __init__(self) -> None:
        self.names: dict[str, list[ShardName]] = {}
        self.groups: list[tuple[int, int]] = []
        self.waiting: list[Shard] = []
        self.num_waiting_rows = self.num_units = self.num_rows = 0
        self.sinks = {"rows": io.BytesIO(), "units": io.BytesIO()}
        self.writers = {
            "rows": _writer(self.sinks["rows"], MEASUREMENT_SCHEMA),
            "units": _writer(self.sinks["units"], RECORD_SCHEMA),
        }

    @property
    def is_full(self) -> bool:
        """Whether the next unit belongs into another pack."""
        return self.num_units >= MAX_UNITS or self.num_rows >= MAX_ROWS

    def add(self, shard: Shard) -> None:
        """Append a unit."""
        name = name_of(shard.unit)
        self.names.setdefault(name.spec_key, []).append(name)
        self.waiting.append(shard)
        self.num_units += 1
        self.num_rows += shard.table.num_rows
        self.num_waiting_rows += shard.table.num_rows
        if len(self.waiting) >= GROUP_UNITS or self.num_waiting_rows >= GROUP_ROWS:
            self._flush()

    def finish(self) -> Packed:
        """The finished files and index."""
        self._flush()
        for writer in self.writers.values():
            writer.close()
        data = {kind: sink.getvalue() for kind, sink in self.sinks.items()}
        segments = {kind: _segments(content) for kind, content in data.items()}
        key = _index_key(segments)
        time = datetime.now(UTC).strftime(TIME_FORMAT)
        stem = f"{key.removesuffix('.json')}-{time}-{secrets.token_hex(4)}"
        index = Index(
            key=key,
            names={key: tuple(names) for key, names in self.names.items()},
            groups=tuple(self.groups),
            rows=PackedFile(f"{stem}.rows.parquet", segments["rows"]),
            units=PackedFile(f"{stem}.units.parquet", segments["units"]),
        )
        index_data = encode_index(index)
        files = {index.rows.key: data["rows"], index.units.key: data["units"]}
        # A copy, because a damaged index would take all units with it.
        return Packed(index, files | {index.copy_key: index_data}, index_data)

    def _flush(self) -> None:
        if not self.waiting:
            return
        rows = joined([shard.table for shard in self.waiting])
        for kind, table in (
            ("rows", rows),
            ("units", record_table(shard.unit for shard in self.waiting)),
        ):
            if len(table):
                self.writers[kind].write_table(table, row_group_size=len(table))
        self.groups.append((len(self.waiting), len(rows)))
        self.waiting, self.num_waiting_rows = [], 0


def joined(tables: Sequence[pa.Table], schema: pa.Schema = MEASUREMENT_SCHEMA) -> pa.Table:
    """Tables one below the other, with common dictionaries."""
    if not tables:
        return schema.empty_table()
    return pa.concat_tables(tables).unify_dictionaries() if len(tables) > 1 else tables[0]


def encode_index(index: Index) -> bytes:
    """An index as JSON that carries its own digest."""
    body = {
        "pack_version": PACK_VERSION,
        "schema_version": SCHEMA_VERSION,
        "names": {key: [_short(name) for name in names] for key, names in index.names.items()},
        "groups": index.groups,
        "rows": index.rows._asdict(),
        "units": index.units._asdict(),
    }
    return _dumped(body | {"sha256": _sha256(_dumped(body))})


def decode_index(data: bytes, *, key: str) -> Index:
    """Verify and read an index.

    Raises:
        ShardError: Any byte differs from what was written, another flatcensus wrote it, or it is
            not under its own name.
    """
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
        is_whole = _sha256(_dumped(body)) == digest and _dumped(body | {"sha256": digest}) == data
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        body, is_whole = {}, False
    if not is_whole:
        raise ShardError(key, "the index of a pack is damaged or not complete")
    try:
        return _index(body, key)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ShardError(key, f"the index of a pack is not valid: {error!r}") from error


def _index(body: dict[str, Any], key: str) -> Index:
    """The index that a body stands for. Raises whatever a forged one may cause."""
    versions = (body["pack_version"], body["schema_version"])
    if versions != (PACK_VERSION, SCHEMA_VERSION):
        raise ShardError(
            key,
            f"pack and schema version {versions}, this flatcensus reads "
            f"{(PACK_VERSION, SCHEMA_VERSION)}: update flatcensus to read it, or run "
            "`flatcensus resume` to compute its units again",
        )
    files = {
        kind: PackedFile(
            str(body[kind]["key"]), tuple((int(s), str(d)) for s, d in body[kind]["segments"])
        )
        for kind in ("rows", "units")
    }
    if key != _index_key({kind: file.segments for kind, file in files.items()}):
        raise ShardError(key, "the index of a pack is not under its own name")
    stem = files["rows"].key.removesuffix(".rows.parquet")
    # A forged index shall not make anybody delete what is no part of a pack.
    if {file.key for file in files.values()} != {f"{stem}.{kind}.parquet" for kind in files}:
        raise ValueError(f"files {files} do not belong together")
    if not stem.startswith(f"{key.removesuffix('.json')}-"):
        raise ValueError(f"files {stem} of another pack")
    names = {
        spec_key: tuple(_long(spec_key, short) for short in shorts)
        for spec_key, shorts in body["names"].items()
    }
    index = Index(key, names, tuple((int(u), int(r)) for u, r in body["groups"]), **files)
    if index.num_units != sum(map(len, names.values())):
        raise ValueError(f"{index.num_units} units in groups, others by name")
    return index


def _index_key(segments: dict[str, tuple[tuple[int, str], ...]]) -> str:
    """The name that follows from the content."""
    return f"{FOLDER}{_sha256(json.dumps(segments).encode())[:24]}.json"


def _short(name: ShardName) -> list[int]:
    """A name without its spec and what has its usual value."""
    draws = (name.draw_start, name.draw_stop)
    tail = [*draws] if draws != (0, 1) or name.generation is not None else []
    return [name.start, name.stop, *tail, *([] if name.generation is None else [name.generation])]


def _long(spec_key: str, short: Sequence[int]) -> ShardName:
    start, stop, *rest = short
    draw_start, draw_stop, *generation = rest or (0, 1)
    return ShardName(
        spec_key, start, stop, generation[0] if generation else None, draw_start, draw_stop
    )


def _writer(sink: io.BytesIO, schema: pa.Schema) -> pq.ParquetWriter:
    # Floats are kept as they are: a dictionary would give all NaN the bits of the first.
    plain = [field.name for field in schema if not pa.types.is_floating(field.type)]
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=plain,  # pyright: ignore[reportArgumentType]
        write_page_checksum=True,
    )


def _segments(data: bytes) -> tuple[tuple[int, str], ...]:
    """Ends of the row groups and of the file, each with the digest of what is before it."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    starts = [_start(metadata.row_group(i)) for i in range(metadata.num_row_groups)]
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    stops = [*starts[1:], footer, len(data)] if starts else [len(data)]
    return tuple(
        (stop, _sha256(memoryview(data)[start:stop]))
        for start, stop in itertools.pairwise([0, *stops])
    )


def _start(group: Any) -> int:
    """Offset of the first byte of a row group."""
    columns = (group.column(i) for i in range(group.num_columns))
    return min(
        c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in columns
    )


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _dumped(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
