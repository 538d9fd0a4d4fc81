"""The packs of a run folder: listed, read, published, and set aside when they are damaged.

What is read is verified; verified bytes and decoded groups are kept in memory, within limits, for
readers that go from spec to spec. Files never change under their name, so that is safe.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ShardError, StoreError
from pipeline.pack_file import (
    FOLDER,
    Index,
    Packed,
    PackedFile,
    PackWriter,
    decode_index,
)
from pipeline.schema import MEASUREMENT_SCHEMA
from pipeline.shard_file import Quarantined, Shard, ShardName, set_aside
from pipeline.store import Entry, MissingKeyError, Store
from pipeline.unit_table import RECORD_SCHEMA, records_of

_log = logging.getLogger(__name__)

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


def list_packs(store: Store, quarantined: list[Quarantined] | None = None) -> list[Pack]:
    """All packs, oldest first, from their indexes alone.

    A damaged index is replaced by its copy, or set aside with its pack where that is damaged too;
    either joins ``quarantined`` and is logged.
    """
    while True:
        try:
            return sorted(_packs(store, quarantined), key=lambda p: (p.index.time, p.index.key))
        except MissingKeyError:  # replaced by another pack since it was listed
            continue


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


def publish(store: Store, packed: Packed) -> Pack:
    """Publish a pack, and prove that it can be read.

    Returns:
        The pack; an equal one if another compaction was faster.

    Raises:
        DamagedPackError: It does not read back as it was written.
    """
    for key, data in packed.files.items():
        if not store.put_new(key, data):
            raise StoreError(f"{store.uri}/{key} exists, although its name was drawn at random")
    index = packed.pack
    if not store.put_new(index.key, packed.index_data):
        for key in packed.files:
            store.delete(key)
    found = [pack for pack in list_packs(store) if pack.index.key == index.key]
    if not found:
        raise StoreError(f"{store.uri}/{index.key} was published and is not there. Try again")
    check_pack(store, found[0])
    return found[0]


def set_pack_aside(store: Store, error: DamagedPackError) -> Quarantined | None:
    """Keep the sound groups of a damaged pack as a new one, and move the damaged one away.

    Returns:
        What was moved; None if it is sound when read again, or somebody else moved it.
    """
    index = error.pack.index
    groups = _sound_groups(store, error.pack)
    if len(groups) == len(index.groups):
        return None
    saved = PackWriter()
    for group in groups:
        for shard in group.shards():
            saved.add(shard)
    if saved.num_units:
        publish(store, saved.finish())
    try:
        moved_to = set_aside(store, index.key)
    except MissingKeyError:
        return None
    for key in index.keys:
        try:
            set_aside(store, key)
        except MissingKeyError:
            continue  # it is what was missing
    lost = index.num_units - saved.num_units
    return reported(
        Quarantined(
            index.key,
            moved_to,
            f"{error.reason}; {lost} of its {index.num_units} units are to do again",
        )
    )


def remove_pack(store: Store, pack: Pack) -> None:
    """Delete a pack whose units are elsewhere, its index first."""
    for key in (pack.index.key, *pack.index.keys):
        store.delete(key)


def reported(item: Quarantined) -> Quarantined:
    """Log what was set aside."""
    _log.warning("%s was moved to %s: %s", *item)
    return item


def _packs(store: Store, quarantined: list[Quarantined] | None) -> list[Pack]:
    entries = _entries(store)
    stamps = {entry.key: entry.stamp for entry in entries}
    packs, known = [], {}
    before = _INDEXES.get(store.uri, {})
    for entry in entries:
        if not _is_index(entry.key):
            continue
        index = before.get((entry.key, entry.stamp))
        if index is None:
            data = store.get(entry.key)
            try:
                index = decode_index(data, key=entry.key)
            except ShardError as error:
                index = _restored(store, error, data, stamps, quarantined)
                if index is None:
                    continue
        known[entry.key, entry.stamp] = index
        own = (index.key, *index.keys)
        packs.append(Pack(index, {key: stamps[key] for key in own if key in stamps}))
    _INDEXES[store.uri] = known
    return packs


def _entries(store: Store) -> list[Entry]:
    """The folder, listed until nothing changes: a pack may replace others in the middle of it."""
    entries = store.entries(FOLDER)
    while entries:
        again = store.entries(FOLDER)
        if [e.key for e in again if _is_index(e.key)] == [
            e.key for e in entries if _is_index(e.key)
        ]:
            return again
        entries = again
    return []


def _is_index(key: str) -> bool:
    return key.endswith(".json") and "-" not in key and key.count("/") == 1


def _restored(
    store: Store,
    error: ShardError,
    data: bytes,
    stamps: dict[str, str],
    quarantined: list[Quarantined] | None,
) -> Index | None:
    """The index again from its copy, if that is sound; the damaged one is set aside."""
    index = None
    for copy in stamps:
        if copy.startswith(error.key.removesuffix(".json") + "-") and copy.endswith(".index.json"):
            good = store.get(copy)
            try:
                index = decode_index(good, key=error.key)
            except ShardError:
                continue
            moved = keep_aside(store, error.key, data)
            store.put(error.key, good)
            item = Quarantined(error.key, moved, f"{error.reason}; restored from its copy")
            break
    else:
        moved = set_aside(store, error.key)
        item = Quarantined(error.key, moved, f"{error.reason}; its units are to do again")
    reported(item)
    if quarantined is not None:
        quarantined.append(item)
    return index


def keep_aside(store: Store, key: str, data: bytes) -> str:
    """Keep damaged bytes under ``quarantine/`` while their key is written again."""
    number = 0
    while not store.put_new(target := f"quarantine/{key}.{number}", data):
        number += 1
    return target


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
        or _names(records) != index.names_between(start, start + num_units)
    ):
        raise DamagedPackError(pack, f"group {number} is not what the index says")
    return Group(records, table)


def _names(records: pa.Table) -> list[ShardName]:
    columns = ("spec_key", "start", "stop", "generation", "draw_start", "draw_stop", "status")
    return [
        ShardName(key, start, stop, generation if status == "failed" else None, *draws)
        for key, start, stop, generation, *draws, status in zip(
            *(records[name].to_pylist() for name in columns), strict=True
        )
    ]


def _sound_groups(store: Store, pack: Pack) -> list[Group]:
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
# Of the last listing of each run folder.
_INDEXES: dict[str, dict[tuple[str, str], Index]] = {}
