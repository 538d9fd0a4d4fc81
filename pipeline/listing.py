"""What results are where in a run folder: shards, one file per unit, and packs of many."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterator
from typing import NamedTuple

from pipeline.pack_reading import Pack
from pipeline.packs import list_packs
from pipeline.shard_file import Quarantined, ShardName, order, parse_key
from pipeline.store import Entry, Store

_log = logging.getLogger(__name__)

# A pack with the unit's place in it; None for a shard.
Place = tuple[Pack, int] | None


class Listing(NamedTuple):
    """What is where. Packs go before shards, older ones before newer ones."""

    loose: dict[str, list[ShardName]]
    packs: list[Pack]
    wanted: Collection[str] | None

    def spec_keys(self) -> list[str]:
        """Specs that have units."""
        found = set(self.loose)
        for pack in self.packs:
            found.update(
                pack.index.names
                if self.wanted is None
                else (key for key in self.wanted if key in pack.index.names)
            )
        return sorted(found)

    def names(self, key: str) -> list[ShardName]:
        """The units of a spec, each once, in order."""
        parts = [pack.index.names[key] for pack in self.packs if key in pack.index.names]
        loose = self.loose.get(key, [])
        if not parts:
            return loose
        if len(parts) == 1 and not loose:
            return list(parts[0])
        return sorted({*itertools.chain(*parts), *loose}, key=order)

    def places(self, key: str) -> list[tuple[ShardName, Place]]:
        """The same with where they are."""
        found: dict[ShardName, Place] = {}
        for pack in self.packs:
            start = pack.index.first_place.get(key, 0)
            for place, name in enumerate(pack.index.names.get(key, ()), start=start):
                found.setdefault(name, (pack, place))
        for name in self.loose.get(key, ()):
            found.setdefault(name, None)
        return sorted(found.items(), key=lambda item: order(item[0]))


def take_listing(
    store: Store,
    spec_keys: Collection[str] | None,
    quarantined: list[Quarantined] | None = None,
) -> Listing:
    """Shards first: what is packed meanwhile is then found in its pack."""
    loose: dict[str, list[ShardName]] = {}
    for key in itertools.chain.from_iterable(map(store.list, _prefixes(spec_keys))):
        name = parse_key(key)
        if name is None:
            _log.warning("%s is not a shard's name; the file is left alone and not used", key)
        else:
            loose.setdefault(name.spec_key, []).append(name)
    for names in loose.values():
        names.sort(key=order)
    return Listing(
        loose, list_packs(store, quarantined), None if spec_keys is None else set(spec_keys)
    )


def loose_shards(
    store: Store, spec_keys: Collection[str] | None = None
) -> Iterator[tuple[ShardName, Entry]]:
    """Units that have a file of their own, with its stamp."""
    for prefix in _prefixes(spec_keys):
        for entry in store.entries(prefix):
            name = parse_key(entry.key)
            if name is not None:
                yield name, entry


def _prefixes(spec_keys: Collection[str] | None) -> list[str]:
    return ["shards/"] if spec_keys is None else [f"shards/{k}/" for k in sorted(set(spec_keys))]
