"""The results in a run folder: shards, one file per unit, and packs of many; both alike.

Readers see a unit once, wherever it is and however often. While they read, somebody else may pack
shards or set damaged ones aside: what is gone is then looked for again.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa

from pipeline.errors import ShardError, StoreError
from pipeline.listing import Listing, Place, loose_shards, take_listing
from pipeline.pack_file import joined
from pipeline.pack_reading import DamagedPackError, Group, Pack, check_pack, read_group
from pipeline.packs import keep_aside, list_packs, report, set_pack_aside, set_shard_aside
from pipeline.read_ahead import read_ahead
from pipeline.schema import MEASUREMENT_SCHEMA, UnitRecord
from pipeline.shard_file import (
    Quarantined,
    Shard,
    ShardName,
    check_shard,
    decode_shard,
    encode_shard,
    parse_key,
    shard_key,
)
from pipeline.store import MissingKeyError, Store
from pipeline.unit_table import RECORD_SCHEMA, record_table, records_of
from tasks.block import Block

__all__ = [
    "NOTHING",
    "Found",
    "Quarantined",
    "Shard",
    "ShardName",
    "any_done",
    "decode_shard",
    "encode_shard",
    "has_shard",
    "list_shards",
    "loose_shards",
    "parse_key",
    "peek_record",
    "read_found",
    "read_shards",
    "shard_key",
    "verify",
]

MAX_LOOKS = 20  # times that one spec's units may be moved while they are read; chosen

OnCorrupt = Literal["quarantine", "raise"]


class Found(NamedTuple):
    """Units of one spec in order: their records, and their rows one unit after another."""

    units: pa.Table
    rows: pa.Table


NOTHING = Found(RECORD_SCHEMA.empty_table(), MEASUREMENT_SCHEMA.empty_table())


def list_shards(
    store: Store, spec_keys: Collection[str] | None = None
) -> dict[str, list[ShardName]]:
    """Names of all units by spec, sorted by range, from listings and indexes: no result is read."""
    listing = take_listing(store, spec_keys)
    return {key: names for key in listing.spec_keys() if (names := listing.names(key))}


def any_done(present: Mapping[str, Sequence[ShardName]], spec_keys: Iterable[str]) -> bool:
    """Whether one of these specs has a result among the units that ``list_shards`` found."""
    return any(name.generation is None for key in spec_keys for name in present.get(key, ()))


def has_shard(store: Store, spec_key: str, block: Block) -> bool:
    """Whether a unit is done."""
    key = shard_key(spec_key, block)
    if store.exists(key):
        return True
    wanted = parse_key(key)
    return any(wanted in pack.index.names.get(spec_key, ()) for pack in list_packs(store))


def read_shards(
    store: Store,
    spec_keys: Collection[str] | None = None,
    *,
    on_corrupt: OnCorrupt = "quarantine",
    quarantined: list[Quarantined] | None = None,
) -> Iterator[Shard]:
    """Read and verify units one by one, by spec and range, failures included.

    Args:
        store: The run folder.
        spec_keys: Only these specs; None for all.
        on_corrupt: Whether a shard that is damaged or of another schema is moved to
            ``quarantine/`` (its unit is then to do again) or raised as ShardError; packs alike.
        quarantined: Receives what was set aside; it is logged as a warning in any case.
    """
    found = read_found(store, spec_keys, on_corrupt=on_corrupt, quarantined=quarantined)
    for _, (units, rows) in found:
        yield from Group(units, rows).shards()


def read_found(
    store: Store,
    spec_keys: Collection[str] | None = None,
    *,
    on_corrupt: OnCorrupt = "quarantine",
    quarantined: list[Quarantined] | None = None,
) -> Iterator[tuple[str, Found]]:
    """The same by spec, for many units at once."""
    whole = take_listing(store, spec_keys, quarantined)
    order_of_reading = (
        name.key for key in whole.spec_keys() for name, place in whole.places(key) if place is None
    )
    with read_ahead(store, order_of_reading) as get:
        yield from _each(store, get, whole, on_corrupt, quarantined)


def _each(
    store: Store,
    get: Callable[[str], bytes],
    whole: Listing,
    on_corrupt: OnCorrupt,
    quarantined: list[Quarantined] | None,
) -> Iterator[tuple[str, Found]]:
    """What is found of each spec; ``get`` may have read it already."""
    for key in whole.spec_keys():
        listing = whole
        for _ in range(MAX_LOOKS):
            try:
                found = _read(store, get, listing.places(key), on_corrupt, quarantined)
                break
            except MissingKeyError:
                pass
            except DamagedPackError as error:
                if on_corrupt == "raise":
                    raise
                set_pack_aside(store, error, quarantined)
            listing = take_listing(store, [key], quarantined)
        else:
            raise StoreError(
                f"the results below {store.uri}/shards/{key} were moved {MAX_LOOKS} times while "
                "they were read. Try again when nobody else works on them"
            )
        if len(found.units):
            yield key, found


def verify(store: Store, known: set[str] | None = None) -> list[Quarantined]:
    """Read and check every byte of shards and packs, and set aside what is damaged.

    Args:
        store: The run folder.
        known: Objects that were found sound before, not to be read again while nobody rewrites
            them; filled in.
    """
    known = set() if known is None else known
    quarantined: list[Quarantined] = []
    unknown = [
        (name, f"{entry.key} {entry.stamp}")
        for entry in store.entries("shards/")
        if (name := parse_key(entry.key)) is not None and f"{entry.key} {entry.stamp}" not in known
    ]
    with read_ahead(store, (name.key for name, _ in unknown)) as get:
        for name, here in unknown:
            try:
                check_shard(get(name.key), key=name.key)
            except MissingKeyError:
                continue  # packed or set aside since
            except ShardError as error:
                set_shard_aside(store, error, quarantined)
            else:
                known.add(here)
    for pack in list_packs(store, quarantined):
        if pack.known_as in known:
            continue
        try:
            check_pack(store, pack)
            _check_copy(store, pack, quarantined)
        except MissingKeyError:
            continue
        except DamagedPackError as error:
            set_pack_aside(store, error, quarantined)
        else:
            known.add(pack.known_as)
    return quarantined


def peek_record(store: Store, key: str) -> UnitRecord | None:
    """A unit's record by the key of its shard; None if it is gone or damaged."""
    try:
        return check_shard(store.get(key), key=key)
    except ShardError:
        return None
    except MissingKeyError:
        name = parse_key(key)
    if name is None:
        return None
    for pack in list_packs(store):
        names = pack.index.names.get(name.spec_key, ())
        if name in names:
            place = pack.index.first_place[name.spec_key] + names.index(name)
            try:
                number, offset = group_of(pack, place)
                (record,) = records_of(read_group(store, pack, number).units.slice(offset, 1))
            except (ShardError, MissingKeyError):
                return None
            return record
    return None


def _read(
    store: Store,
    get: Callable[[str], bytes],
    places: list[tuple[ShardName, Place]],
    on_corrupt: OnCorrupt,
    quarantined: list[Quarantined] | None,
) -> Found:
    """The units at these places; neighbours in a group are cut out together."""
    parts: list[Group] = []
    waiting: list[Shard] = []
    run: tuple[Pack, int, int] | None = None

    def flush() -> None:
        nonlocal run
        if waiting:
            units = record_table(shard.unit for shard in waiting)
            parts.append(Group(units, joined([shard.table for shard in waiting])))
            waiting.clear()
        if run is not None:
            parts.extend(_cut(store, *run))
            run = None

    for name, place in places:
        if place is None:
            if run is not None:
                flush()
            try:
                waiting.append(decode_shard(get(name.key), key=name.key))
            except ShardError as error:
                if on_corrupt == "raise":
                    raise
                set_shard_aside(store, error, quarantined)
        elif run is not None and run[0] is place[0] and run[2] == place[1]:
            run = (run[0], run[1], place[1] + 1)
        else:
            flush()
            run = (*place, place[1] + 1)
    flush()
    if not parts:
        return NOTHING
    return Found(
        pa.concat_tables([part.units for part in parts]), joined([part.rows for part in parts])
    )


def _cut(store: Store, pack: Pack, start: int, stop: int) -> Iterator[Group]:
    """The units of a pack between two places."""
    while start < stop:
        number, first = group_of(pack, start)
        group = read_group(store, pack, number)
        last = min(first + stop - start, len(group.units))
        counts = group.units["num_rows"].to_pylist()
        before, inside = sum(counts[:first]), sum(counts[first:last])
        yield Group(group.units.slice(first, last - first), group.rows.slice(before, inside))
        start += last - first


def group_of(pack: Pack, place: int) -> tuple[int, int]:
    """The number of the group at a place of a pack, and the place within it."""
    starts = pack.index.group_starts
    number = bisect.bisect_right(starts, place) - 1
    return number, place - starts[number]


def _check_copy(store: Store, pack: Pack, quarantined: list[Quarantined]) -> None:
    """The copy of an index equals it, or is written again."""
    key, good = pack.index.copy_key, store.get(pack.index.key)
    try:
        found = store.get(key)
    except MissingKeyError:
        store.put(key, good)
        return
    if found != good:
        moved = keep_aside(store, key, found)
        store.put(key, good)
        reason = "the copy of an index is damaged; written again, nothing is lost"
        report(Quarantined(key, moved, reason), quarantined)
