"""Shards: the Parquet file of one unit, which proves its own integrity.

A shard carries its unit's record and a SHA-256 digest in its own key-value metadata. The digest is
taken over the whole file with the digest's 64 characters set to '0', then written in place (Thrift
strings are length-prefixed, so nothing moves). One file therefore vouches for every one of its own
bytes, footer included, without a second file that could be lost or go out of step.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from pipeline.errors import ShardError
from pipeline.schema import CONSTANT_FIELDS, MEASUREMENT_SCHEMA, SCHEMA_VERSION, UnitRecord
from tasks.block import Block

if TYPE_CHECKING:  # tasks imports torch, which readers of shards do not need
    from pipeline.schema import Constants
    from pipeline.store import Store
    from tasks.measurement import Row

_UNIT, _VERSION, _DIGEST = "flatcensus.unit", "flatcensus.schema_version", "flatcensus.sha256"
_BLANK = b"0" * 64
# The digest's key and value as Thrift's compact protocol writes them: two string fields (0x18),
# each with its length. Control characters cannot occur in the JSON of the unit's record.
_MARK = b"\x18" + bytes([len(_DIGEST)]) + _DIGEST.encode() + b"\x18" + bytes([len(_BLANK)])
_TAIL = 8  # a Parquet file ends with the footer's length and b"PAR1"


class Shard(NamedTuple):
    """A verified shard."""

    table: pa.Table
    unit: UnitRecord


class ShardName(NamedTuple):
    """What a shard's key says; ``generation`` is None unless it records a failure."""

    spec_key: str
    start: int
    stop: int
    generation: int | None = None
    draw_start: int = 0
    draw_stop: int = 1

    @property
    def block(self) -> Block:
        """The samples and draws of the unit."""
        return Block(range(self.start, self.stop), range(self.draw_start, self.draw_stop))

    @property
    def key(self) -> str:
        """The key in the run folder."""
        return shard_key(self.spec_key, self.block, self.generation)


class Quarantined(NamedTuple):
    """A shard that was set aside: where it was, where it is, and why."""

    key: str
    moved_to: str
    reason: str


def encode_shard(rows: Sequence[Row], unit: UnitRecord, columns: Constants) -> bytes:
    """Encode a unit's rows and record; the bytes are a function of the arguments alone.

    Raises:
        ValueError: The rows do not fit the record or the schema.
    """
    if len(rows) != unit.num_rows:
        raise ValueError(f"unit.num_rows is {unit.num_rows}, but there are {len(rows)} rows")
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer, MEASUREMENT_SCHEMA, compression="zstd", write_page_checksum=True
    ) as writer:
        writer.write_table(_table(rows, unit, columns))
        writer.add_key_value_metadata(
            {
                _UNIT: unit.model_dump_json(by_alias=True),
                _VERSION: str(SCHEMA_VERSION),
                _DIGEST: _BLANK.decode(),
            }
        )
    data = bytearray(buffer.getvalue())
    place = _digest_place(data)
    assert place is not None, "the Parquet writer changed its layout"
    assert data[place : place + len(_BLANK)] == _BLANK, "the digest's place is not blank"
    data[place : place + len(_BLANK)] = hashlib.sha256(data).hexdigest().encode()
    shard = decode_shard(bytes(data), key=name_of(unit).key)
    # Compared as JSON, because NaN differs from itself.
    assert shard.unit.model_dump_json() == unit.model_dump_json(), (
        "the record does not read back as it was written"
    )
    return bytes(data)


def decode_shard(data: bytes, *, key: str) -> Shard:
    """Verify and read a shard.

    Raises:
        ShardError: Any byte differs from what was written, the schema version is another, or the
            file is not under its own name.
    """
    file, unit = _checked(data, key)
    return Shard(file.read(use_threads=False), unit)


def check_shard(data: bytes, *, key: str) -> UnitRecord:
    """Verify a shard as ``decode_shard`` does, without reading its rows."""
    return _checked(data, key)[1]


def shard_key(spec_key: str, block: Block, generation: int | None = None) -> str:
    """Key of a unit's result, or of its failure record of that generation.

    ``<first sample>-<stop>`` for units without weight draws, then ``x<first draw>-<stop>``.
    """
    samples, draws = block.samples, block.draws
    name = f"{samples.start}-{samples.stop}"
    if draws != range(1):
        name += f"x{draws.start}-{draws.stop}"
    if generation is not None:
        name += f".failed-{generation}"
    return f"shards/{spec_key}/{name}.parquet"


def parse_key(key: str) -> ShardName | None:
    """What a key says, or None if it is not a shard's."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    spec_key, start, stop, draw_start, draw_stop, generation = match.groups()
    first, last = int(start), int(stop)
    draws = (0, 1) if draw_start is None else (int(draw_start), int(draw_stop))
    if last <= first or draws[1] <= draws[0] or (draw_start is not None and draws == (0, 1)):
        return None
    return ShardName(
        sys.intern(spec_key), first, last, None if generation is None else int(generation), *draws
    )


# Numbers as ``shard_key`` writes them, so that a key has one spelling.
_NUMBER = "(0|[1-9][0-9]*)"
_KEY = re.compile(
    rf"shards/([^/]+)/{_NUMBER}-{_NUMBER}(?:x{_NUMBER}-{_NUMBER})?"
    rf"(?:\.failed-{_NUMBER})?\.parquet"
)


def set_aside(store: Store, key: str) -> str:
    """Move an object out of the way, keeping its bytes. Returns the new key."""
    base = key.removeprefix("shards/")
    number = 0
    while not store.move(key, target := f"quarantine/{base}.{number}"):
        number += 1
    return target


def name_of(unit: UnitRecord) -> ShardName:
    """The name that a unit's record stands for."""
    generation = unit.generation if unit.status == "failed" else None
    return ShardName(
        unit.spec_key, unit.start, unit.stop, generation, unit.draw_start, unit.draw_stop
    )


def order(name: ShardName) -> tuple[int, ...]:
    """Sorting key of the units of one spec."""
    generation = -1 if name.generation is None else name.generation
    return (name.draw_start, name.start, name.stop, name.draw_stop, generation)


def _checked(data: bytes, key: str) -> tuple[pq.ParquetFile, UnitRecord]:
    place = _digest_place(data)
    if place is None:
        raise ShardError(key, f"not a complete shard ({len(data)} bytes): truncated or damaged")
    digest = hashlib.sha256(memoryview(data)[:place])
    digest.update(_BLANK)
    digest.update(memoryview(data)[place + len(_BLANK) :])
    if digest.hexdigest().encode() != data[place : place + len(_BLANK)]:
        raise ShardError(key, "its SHA-256 does not match its content: damaged after writing")
    file = pq.ParquetFile(pa.BufferReader(data))
    metadata = file.metadata.metadata or {}
    _check_version(metadata.get(_VERSION.encode(), b"").decode(), key)
    try:
        unit = UnitRecord.model_validate_json(metadata[_UNIT.encode()])
    except pydantic.ValidationError as error:
        raise ShardError(key, f"its unit record is not valid: {error}") from error
    if not file.schema_arrow.equals(MEASUREMENT_SCHEMA):
        raise ShardError(key, f"its columns are not those of schema version {SCHEMA_VERSION}")
    if file.metadata.num_rows != unit.num_rows:
        raise ShardError(key, f"has {file.metadata.num_rows} rows, its record says {unit.num_rows}")
    if parse_key(key) != name_of(unit):
        raise ShardError(key, f"was written as {name_of(unit).key}: renamed or copied by hand")
    return file, unit


def _table(rows: Sequence[Row], unit: UnitRecord, columns: Constants) -> pa.Table:
    """The rows as a table of MEASUREMENT_SCHEMA."""
    constant_names = {field.name for field in CONSTANT_FIELDS}
    arrays = []
    for field in MEASUREMENT_SCHEMA:
        if field.name in constant_names:
            source = columns if hasattr(columns, field.name) else unit
            values = [getattr(source, field.name)] * len(rows)
        else:
            values = [getattr(row, field.name) for row in rows]
        if not field.nullable and None in values:
            raise ValueError(f"column {field.name!r} must have a value in every row, found None")
        arrays.append(pa.array(values, type=field.type))
    return pa.table(arrays, schema=MEASUREMENT_SCHEMA)


def _digest_place(data: bytes | bytearray) -> int | None:
    """Offset of the digest's characters, or None if this is not a whole shard."""
    if len(data) < _TAIL or data[-4:] != b"PAR1":
        return None
    footer_start = len(data) - _TAIL - int.from_bytes(data[-_TAIL:-4], "little")
    # Key-value metadata comes after the column statistics, so the last mark is the real one.
    mark = data.rfind(_MARK, max(footer_start, 0), len(data) - _TAIL - len(_BLANK))
    return None if footer_start < 4 or mark < 0 else mark + len(_MARK)


def _check_version(version: str, key: str) -> None:
    if version == str(SCHEMA_VERSION):
        return
    newer = version.isdigit() and int(version) > SCHEMA_VERSION
    todo = (
        "update flatcensus to read it" if newer else "run `flatcensus resume` to compute it again"
    )
    raise ShardError(
        key,
        f"schema version {version or 'missing'!r}, this flatcensus reads {SCHEMA_VERSION}: {todo}",
    )
