"""Many small shards into few large files, without changing any result.

Order makes it safe to kill at any point, to run beside launches, and to run twice at once: a pack
is complete before its index exists, its shards are deleted after it was read back, and a pack is
removed only when each of its units is in a newer one. Whatever is left in between is a duplicate,
which readers see once, or garbage, which nobody reads and a later compaction removes.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np

from pipeline.errors import ShardError, StoreError
from pipeline.listing import loose_shards
from pipeline.pack_file import MAX_ROWS, MAX_UNITS, TIME_FORMAT, Packed, PackWriter
from pipeline.pack_index import FOLDER
from pipeline.pack_reading import DamagedPackError, Group, Pack, check_pack, read_group
from pipeline.packs import (
    list_packs,
    publish,
    remove_pack,
    set_pack_aside,
    set_shard_aside,
)
from pipeline.read_ahead import read_ahead
from pipeline.shard_file import Quarantined, Shard, ShardName, decode_shard, order
from pipeline.shards import group_of
from pipeline.store import MissingKeyError, Store

MANY = 500  # loose shards worth packing without being asked; chosen
NUM_AT_ONCE = 8  # deletions: chosen, a bucket answers each in tens of milliseconds
GARBAGE_AGE = timedelta(hours=24)  # of files without an index: their writer is dead; chosen

_log = logging.getLogger(__name__)


@dataclass
class Compaction:
    """What a compaction did.

    Attributes:
        num_units: Shards that are in packs now and were not before.
        num_packs: Packs written.
        num_merged: Packs whose units are in newer packs now.
        num_duplicates: Shards deleted because an equal one was packed before.
        nondeterminism: Shards set aside because another one with other numbers was packed before.
        quarantined: Damaged shards and packs, set aside.
    """

    num_units: int = 0
    num_packs: int = 0
    num_merged: int = 0
    num_duplicates: int = 0
    nondeterminism: list[Quarantined] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)


def compact(store: Store, *, progress: Callable[[int, int], None] | None = None) -> Compaction:
    """Pack all loose shards and merge small packs.

    Args:
        store: The run folder. Others may work on it meanwhile.
        progress: Hears how many units are done, of how many.

    Raises:
        StoreError: The store failed, such as a full disk. Nothing is lost; run it again.
    """
    done = Compaction()
    packs = _sound_packs(store, done.quarantined)
    loose = {name: entry.stamp for name, entry in loose_shards(store)}
    known = {
        name: (pack, place)
        for pack in reversed(packs)
        for place, name in enumerate(_names(pack))
        if name in loose
    }
    for name, (pack, place) in known.items():
        _settle_duplicate(store, name, loose.pop(name), pack, place, done)
    places: dict[ShardName, tuple[Pack, int] | None] = dict.fromkeys(loose)
    small = [pack for pack in packs if _is_small(pack)]
    if loose or len(small) > 1:
        for pack in small:
            for place, name in enumerate(_names(pack)):
                places.setdefault(name, (pack, place))
    finished = 0
    ordered = sorted(places.items(), key=lambda item: (item[0].spec_key, order(item[0])))
    for packed in _packed(_shards(store, ordered, done)):
        if not _published(store, packed, done):
            continue
        done.num_packs += 1
        done.num_units += _delete_packed(store, packed, loose)
        finished += packed.pack.num_units
        if progress is not None:
            progress(finished, len(ordered))
    _remove_redundant(store, done)
    _remove_garbage(store)
    return done


def pack_if_many(store: Store) -> Compaction | None:
    """Compact if there are so many loose shards that reading them one by one takes long.

    Without space for a pack they stay as they are, which is slower and no less safe.
    """
    count = sum(1 for _ in itertools.islice(loose_shards(store), MANY + 1))
    if count <= MANY:
        return None
    try:
        return compact(store)
    except StoreError as error:
        if not error.disk_full:
            raise
        _log.warning("shards were not packed: %s", error)
        return None


def _sound_packs(store: Store, quarantined: list[Quarantined]) -> list[Pack]:
    """All packs, verified; damaged ones are replaced by what is sound of them."""
    while True:
        damaged = False
        packs = list_packs(store, quarantined)
        for pack in packs:
            try:
                check_pack(store, pack)
            except MissingKeyError:
                damaged = True  # merged by somebody else since
            except DamagedPackError as error:
                damaged = True
                set_pack_aside(store, error, quarantined)
        if not damaged:
            return packs


def _settle_duplicate(
    store: Store, name: ShardName, stamp: str, pack: Pack, place: int, done: Compaction
) -> None:
    """Drop a shard that a late worker committed after its unit was packed, if they are equal."""
    try:
        late = decode_shard(store.get(name.key), key=name.key)
        number, offset = group_of(pack, place)
        first = read_group(store, pack, number).shards()[offset]
    except MissingKeyError:
        return  # somebody else settles it
    except DamagedPackError as error:
        set_pack_aside(store, error, done.quarantined)
        return
    except ShardError as error:
        set_shard_aside(store, error, done.quarantined)
        return
    if _equal(late, first):
        if any(n == name and e.stamp == stamp for n, e in loose_shards(store, [name.spec_key])):
            store.delete(name.key)
        done.num_duplicates += 1
        return
    reason = "holds other numbers than the shard of this unit that was packed before, which is kept"
    set_shard_aside(store, ShardError(name.key, reason), done.nondeterminism)


def _equal(one: Shard, other: Shard) -> bool:
    """The same numbers, to the bit or both NaN."""
    values = (shard.table.column("value").to_numpy() for shard in (one, other))
    return np.array_equal(*values, equal_nan=True)


def _names(pack: Pack) -> Iterator[ShardName]:
    return itertools.chain.from_iterable(pack.index.names.values())


def _is_small(pack: Pack) -> bool:
    num_rows = sum(rows for _, rows in pack.index.groups)
    return pack.index.num_units < MAX_UNITS // 2 and num_rows < MAX_ROWS // 2


def _shards(
    store: Store,
    places: Sequence[tuple[ShardName, tuple[Pack, int] | None]],
    done: Compaction,
) -> Iterator[Shard]:
    """The units at these places; what is damaged is set aside, what is gone is somebody else's."""
    loose = (name.key for name, place in places if place is None)
    with read_ahead(store, loose) as get:
        yield from _each(store, get, places, done)


def _each(
    store: Store,
    get: Callable[[str], bytes],
    places: Sequence[tuple[ShardName, tuple[Pack, int] | None]],
    done: Compaction,
) -> Iterator[Shard]:
    latest: tuple[Group, list[Shard]] | None = None
    for name, place in places:
        try:
            if place is None:
                yield decode_shard(get(name.key), key=name.key)
                continue
            number, offset = group_of(place[0], place[1])
            group = read_group(store, place[0], number)
            if latest is None or latest[0] is not group:
                latest = (group, group.shards())
            yield latest[1][offset]
        except MissingKeyError:
            continue
        except DamagedPackError as error:
            set_pack_aside(store, error, done.quarantined)
        except ShardError as error:
            set_shard_aside(store, error, done.quarantined)


def _packed(shards: Iterable[Shard]) -> Iterator[Packed]:
    writer = PackWriter()
    for shard in shards:
        writer.add(shard)
        if writer.is_full:
            yield writer.finish()
            writer = PackWriter()
    if writer.num_units:
        yield writer.finish()


def _published(store: Store, packed: Packed, done: Compaction) -> bool:
    try:
        publish(store, packed)
    except DamagedPackError as error:  # the store does not keep what it is given
        set_pack_aside(store, error, done.quarantined)
        return False
    return True


def _delete_packed(store: Store, packed: Packed, stamps: dict[ShardName, str]) -> int:
    """Delete the shards that a pack was made of. Returns how many there were."""
    names = set(itertools.chain.from_iterable(packed.pack.names.values()))
    keys = [
        entry.key
        for name, entry in loose_shards(store, packed.pack.names)
        # A file that was rewritten since is not the one that was packed.
        if name in names and entry.stamp == stamps.get(name)
    ]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        list(pool.map(store.delete, keys))
    return len(keys)


def _remove_redundant(store: Store, done: Compaction) -> None:
    """Remove packs of which every unit is in newer ones: all who do so agree which are newer."""
    seen: set[ShardName] = set()
    for pack in reversed(list_packs(store)):
        names = set(_names(pack))
        if names <= seen:
            remove_pack(store, pack)
            done.num_merged += 1
        seen |= names


def _remove_garbage(store: Store) -> None:
    """Remove old files that no index names, left by compactions that were killed."""
    entries = store.entries(FOLDER)
    used = {key for pack in list_packs(store) for key in pack.index.keys}
    for entry in entries:
        match = _DATA_FILE.fullmatch(entry.key)
        if match is None or entry.key in used:
            continue
        written = datetime.strptime(match[1], TIME_FORMAT).replace(tzinfo=UTC)
        if datetime.now(UTC) - written > GARBAGE_AGE:
            _log.info("%s is left from a compaction that did not finish; removed", entry.key)
            store.delete(entry.key)


_DATA_FILE = re.compile(rf"{FOLDER}[0-9a-f]+-([0-9T.]+Z)-[0-9a-f]+\.(?:rows|units|index)\.\w+")
