"""The packs of a run folder: listed, published, and set aside when they are damaged.

A damaged index is restored from its copy; of damaged files the sound groups become a new pack.
"""

from __future__ import annotations

import logging

from pipeline.errors import ShardError, StoreError
from pipeline.pack_file import Packed, PackWriter
from pipeline.pack_index import FOLDER, Index, decode_index
from pipeline.pack_reading import DamagedPackError, Pack, check_pack, sound_groups
from pipeline.shard_file import Quarantined, set_aside
from pipeline.store import Entry, MissingKeyError, Store

_log = logging.getLogger(__name__)


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


def set_pack_aside(
    store: Store, error: DamagedPackError, quarantined: list[Quarantined] | None
) -> None:
    """Keep the sound groups of a damaged pack as a new one, and move the damaged one away.

    What was moved joins ``quarantined``: nothing if the pack is sound when read again, or if
    somebody else moved it.
    """
    index = error.pack.index
    groups = sound_groups(store, error.pack)
    if len(groups) == len(index.groups):
        return
    saved = PackWriter()
    for group in groups:
        for shard in group.shards():
            saved.add(shard)
    if saved.num_units:
        publish(store, saved.finish())
    try:
        moved_to = set_aside(store, index.key)
    except MissingKeyError:
        return
    for key in index.keys:
        try:
            set_aside(store, key)
        except MissingKeyError:
            continue  # it is what was missing
    lost = index.num_units - saved.num_units
    reason = f"{error.reason}; {lost} of its {index.num_units} units are to do again"
    report(Quarantined(index.key, moved_to, reason), quarantined)


def remove_pack(store: Store, pack: Pack) -> None:
    """Delete a pack whose units are elsewhere, its index first."""
    for key in (pack.index.key, *pack.index.keys):
        store.delete(key)


def set_shard_aside(store: Store, error: ShardError, quarantined: list[Quarantined] | None) -> None:
    """Move a damaged shard away, unless somebody else was faster; it joins ``quarantined``."""
    try:
        moved_to = set_aside(store, error.key)
    except MissingKeyError:
        return
    report(Quarantined(error.key, moved_to, error.reason), quarantined)


def report(item: Quarantined, quarantined: list[Quarantined] | None) -> None:
    """Tell what was set aside, in the log and in the list."""
    _log.warning("%s was moved to %s: %s. To do it again: flatcensus resume RUN", *item)
    if quarantined is not None:
        quarantined.append(item)


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
    report(item, quarantined)
    return index


def keep_aside(store: Store, key: str, data: bytes) -> str:
    """Keep damaged bytes under ``quarantine/`` while their key is written again."""
    number = 0
    while not store.put_new(target := f"quarantine/{key}.{number}", data):
        number += 1
    return target


# Of the last listing of each run folder.
_INDEXES: dict[str, dict[tuple[str, str], Index]] = {}
