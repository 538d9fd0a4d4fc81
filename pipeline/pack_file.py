"""Packs: many units in two Parquet files, and an index that vouches for every byte of them.

A pack is ``<id>-<time>-<nonce>.rows.parquet`` (the rows of its units, one unit after another),
``....units.parquet`` (one line per unit, in the same order) and ``<id>.json``, its index, published
last: a pack exists when its index does, and readers follow indexes only. The index names the units
and holds a SHA-256 of every row group and of both footers, so that damage costs the units of one
row group and no others. ``<id>`` is a digest of the content; the files' own names are never used
twice, so that nobody adopts what somebody else may be about to remove.
"""

from __future__ import annotations

import io
import itertools
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.pack_index import Index, PackedFile, encode_index, index_key, sha256
from pipeline.schema import MEASUREMENT_SCHEMA
from pipeline.shard_file import Shard, ShardName
from pipeline.unit_table import RECORD_SCHEMA, names_of, record_table

# Chosen: a listing of a million units reads a hundred indexes; a pack is tens of megabytes.
MAX_UNITS, MAX_ROWS = 10_000, 2_000_000
# Chosen: what a damaged bit can cost, and still few enough groups to read all of them quickly.
GROUP_UNITS, GROUP_ROWS = 256, 100_000
TIME_FORMAT = "%Y%m%dT%H%M%S.%fZ"


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
        self.num_waiting_rows = 0
        self.sinks = {"rows": io.BytesIO(), "units": io.BytesIO()}
        self.writers = {
            "rows": _writer(self.sinks["rows"], MEASUREMENT_SCHEMA),
            "units": _writer(self.sinks["units"], RECORD_SCHEMA),
        }

    @property
    def num_units(self) -> int:
        """Units added."""
        return len(self.waiting) + sum(units for units, _ in self.groups)

    @property
    def is_full(self) -> bool:
        """Whether the next unit belongs into another pack."""
        num_rows = self.num_waiting_rows + sum(rows for _, rows in self.groups)
        return self.num_units >= MAX_UNITS or num_rows >= MAX_ROWS

    def add(self, shard: Shard) -> None:
        """Append a unit."""
        self.waiting.append(shard)
        self.num_waiting_rows += shard.table.num_rows
        if len(self.waiting) >= GROUP_UNITS or self.num_waiting_rows >= GROUP_ROWS:
            self._flush()

    def add_group(self, units: pa.Table, rows: pa.Table) -> None:
        """Append a group of units: their records, and their rows one unit after another."""
        for name in names_of(units):
            self.names.setdefault(name.spec_key, []).append(name)
        for kind, table in (("rows", rows), ("units", units)):
            if len(table):
                self.writers[kind].write_table(table, row_group_size=len(table))
        self.groups.append((len(units), len(rows)))

    def finish(self) -> Packed:
        """The finished files and index."""
        self._flush()
        for writer in self.writers.values():
            writer.close()
        data = {kind: sink.getvalue() for kind, sink in self.sinks.items()}
        segments = {kind: _segments(content) for kind, content in data.items()}
        key = index_key(segments)
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
        if self.waiting:
            self.add_group(
                record_table(shard.unit for shard in self.waiting),
                joined([shard.table for shard in self.waiting]),
            )
        self.waiting, self.num_waiting_rows = [], 0


def joined(tables: Sequence[pa.Table], schema: pa.Schema = MEASUREMENT_SCHEMA) -> pa.Table:
    """Tables one below the other, with common dictionaries."""
    if not tables:
        return schema.empty_table()
    if len(tables) == 1:
        return tables[0]
    # In one piece: many small ones take ten times their content.
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


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
        (stop, sha256(memoryview(data)[start:stop]))
        for start, stop in itertools.pairwise([0, *stops])
    )


def _start(group: Any) -> int:
    """Offset of the first byte of a row group."""
    columns = (group.column(i) for i in range(group.num_columns))
    return min(
        c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in columns
    )
