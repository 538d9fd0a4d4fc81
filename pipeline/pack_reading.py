"""Reading packs: what is read is verified, and kept in memory within limits.

Readers go from spec to spec, and neighbours are in one group. Files never change under their name
and stamp, so keeping them is safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ShardError
from pipeline.pack_index import Index, PackedFile
from pipeline.schema import MEASUREMENT_SCHEMA
from pipeline.shard_file import Shard
from pipeline.store import MissingKeyError, Store
from pipeline.unit_table import RECORD_SCHEMA, names_of, records_of

FILE_CACHE_BYTES, GROUP_CACHE_BYTES = 256 << 20, 128 << 20  # chosen


@dataclass(frozen=True)
class Pack:
    """A pack as listed: its index, and stamps of its files."""

    index: Index
    stamps: dict[str, str]

    @property
    def known_as(self) -> str:
        """What changes when one of its files is rewritten."""
        keys = (self.index.key, *self.index.keys)
        return " ".join([self.index.key, *(self.stamps.get(key, "missing") for key in keys)])


class Group(NamedTuple):
    """Some units of a pack: their records, and their rows one unit after another."""

    units: pa.Table
    rows: pa.Table

    def shards(self) -> list[Shard]:
        """The same unit by unit."""
        shards, start = [], 0
        for record in records_of(self.units):
            shards.append(Shard(self.rows.slice(start, record.num_rows), record))
            start += record.num_rows
        return shards


class DamagedPackError(ShardError):
    """A pack whose files are not what was written."""

    def __init__(self, pack: Pack, reason: str) -> None:
        super().__init__(pack.index.key, reason)
        self.pack = pack


def read_group(store: Store, pack: Pack, number: int) -> Group:
    """One verified group of a pack.

    Raises:
        DamagedPackError: Its files are damaged or missing.
        MissingKeyError: The pack is no more: list again.
    """
    known = (store.uri, pack.known_as, number)
    group = _GROUPS.get(known)
    if group is None:
        group = _decoded(
            pack,
            number,
            _file(store, pack, pack.index.units),
            _file(store, pack, pack.index.rows),
        )
        _GROUPS.put(known, group, group.units.nbytes + group.rows.nbytes)
    return group


def check_pack(store: Store, pack: Pack) -> None:
    """Read all bytes of a pack's files again. Raises as ``read_group`` does."""
    for file in (pack.index.units, pack.index.rows):
        _file(store, pack, file, again=True)


def sound_groups(store: Store, pack: Pack) -> list[Group]:
    """The groups of which every byte is what was written."""
    bad, files = set[int](), {}
    index = pack.index
    with_rows = [number for number, (_, count) in enumerate(index.groups) if count]
    for file, numbers in (
        (index.units, list(range(len(index.groups)))),
        (index.rows, with_rows),
    ):
        try:
            data = store.get(file.key)
        except MissingKeyError:
            return []
        damaged = file.damaged(data)
        if len(file.segments) - 1 in damaged:  # without its footer nothing can be read
            return []
        bad.update(numbers[segment] for segment in damaged)
        files[file.key] = pq.ParquetFile(pa.BufferReader(data))
    units, rows = files[index.units.key], files[index.rows.key]
    found = []
    for number in range(len(index.groups)):
        if number not in bad:
            try:
                found.append(_decoded(pack, number, units, rows))
            except DamagedPackError:
                continue  # counted among what is lost
    return found


def _file(store: Store, pack: Pack, file: PackedFile, *, again: bool = False) -> pq.ParquetFile:
    known = (store.uri, file.key, pack.stamps.get(file.key, "missing"))
    found = None if again else _FILES.get(known)
    if found is None:
        data = _data(store, pack, file)
        bad = file.damaged(data)
        if bad:
            raise DamagedPackError(
                pack, f"{file.key}: SHA-256 of {len(bad)} of its {len(file.segments)} parts differ"
            )
        found = pq.ParquetFile(pa.BufferReader(data))
        _FILES.put(known, found, len(data))
    return found


def _data(store: Store, pack: Pack, file: PackedFile) -> bytes:
    try:
        return store.get(file.key)
    except MissingKeyError:
        if not store.exists(pack.index.key):
            raise
        raise DamagedPackError(pack, f"{file.key} is missing") from None


def _decoded(pack: Pack, number: int, units: pq.ParquetFile, rows: pq.ParquetFile) -> Group:
    """A group as tables; what does not fit the index is no group of this pack."""
    index, (num_units, num_rows) = pack.index, pack.index.groups[number]
    try:
        records = units.read_row_group(number, use_threads=False)
        table = MEASUREMENT_SCHEMA.empty_table()
        if num_rows:
            before = sum(1 for _, count in index.groups[:number] if count)
            table = rows.read_row_group(before, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedPackError(pack, f"group {number} cannot be read: {error}") from error
    start = index.group_starts[number]
    if (
        not records.schema.equals(RECORD_SCHEMA)
        or not table.schema.equals(MEASUREMENT_SCHEMA)
        or (records.num_rows, table.num_rows) != (num_units, num_rows)
        or sum(records["num_rows"].to_pylist()) != num_rows
        or names_of(records) != index.names_between(start, start + num_units)
    ):
        raise DamagedPackError(pack, f"group {number} is not what the index says")
    return Group(records, table)


class _Cache:
    """The most recently used things, up to so many bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total, self.lock = limit, 0, threading.Lock()
        self.held: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """What was put there, or None."""
        with self.lock:
            if key not in self.held:
                return None
            self.held.move_to_end(key)
            return self.held[key][0]

    def put(self, key: Any, thing: Any, size: int) -> None:
        """Keep a thing, and forget the oldest ones."""
        with self.lock:
            self.total += size - (self.held.pop(key, (None, 0))[1])
            self.held[key] = (thing, size)
            while self.total > self.limit and len(self.held) > 1:
                self.total -= self.held.popitem(last=False)[1][1]


_FILES, _GROUPS = _Cache(FILE_CACHE_BYTES), _Cache(GROUP_CACHE_BYTES)
