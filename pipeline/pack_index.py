"""The index of a pack: which units it holds, where, and digests of every byte of its files."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from pipeline.errors import ShardError
from pipeline.schema import SCHEMA_VERSION
from pipeline.shard_file import ShardName

FOLDER = "packs/"
PACK_VERSION = 1


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
            if len(data) < stop or sha256(memoryview(data)[start:stop]) != digest
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
    return _dumped(body | {"sha256": sha256(_dumped(body))})


def decode_index(data: bytes, *, key: str) -> Index:
    """Verify and read an index.

    Raises:
        ShardError: Any byte differs from what was written, another flatcensus wrote it, or it is
            not under its own name.
    """
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
        is_whole = sha256(_dumped(body)) == digest and _dumped(body | {"sha256": digest}) == data
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
    if key != index_key({kind: file.segments for kind, file in files.items()}):
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


def index_key(segments: dict[str, tuple[tuple[int, str], ...]]) -> str:
    """The name that follows from the content."""
    return f"{FOLDER}{sha256(json.dumps(segments).encode())[:24]}.json"


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


def sha256(data: bytes | memoryview) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def _dumped(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
