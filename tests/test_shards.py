"""Shards: exact round trip, refusal of every damaged byte, coverage arithmetic."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema, shard_file
from pipeline.coverage import missing_blocks
from pipeline.errors import ShardError
from pipeline.schema import Constants, Failure, UnitRecord
from pipeline.shard_file import set_aside
from pipeline.shards import (
    Quarantined,
    ShardName,
    decode_shard,
    encode_shard,
    list_shards,
    parse_key,
    peek_record,
    read_shards,
    shard_key,
)
from pipeline.store import Store, open_store
from tasks.block import Block
from tasks.measurement import Row, Status

SPEC = "0123456789abcdef"
CONSTANTS = Constants(
    metric_version=3, code_version="0.1.0", torch_version="2.6.0", timm_version="1.0.9"
)


def _unit(start: int = 0, stop: int = 64, **changes: object) -> UnitRecord:
    fields = {
        "spec_key": SPEC,
        "start": start,
        "stop": stop,
        "checkpoint": "vit_tiny.in1k",
        "family": "vision_transformer",
        "metric": "sensitivity",
        "label": "sensitivity",
        "host": "node-1",
        "device": "cpu",
        "pid": 42,
        "threads": 1,
        "batch_size": 16,
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T00:01:00+00:00",
        "seconds": 60.0,
        "versions": {"torch": "2.6.0"},
        "self_test": {"adjoint_error": 1e-12, "nan": math.nan, "pair": [1, 2]},
        "pinned": {"revision": "a" * 40},
    }
    return UnitRecord.model_validate(fields | changes)


def _failed(start: int = 0, stop: int = 64, **changes: object) -> UnitRecord:
    failure = Failure(class_="oom", type="OutOfMemoryError", message="no memory", hint="smaller")
    return _unit(start, stop, status="failed", failure=failure, **changes)


def _rows(num_rows: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    return [
        Row(
            quantity=rng.choice(["mls", "nmls"]),
            value=rng.gauss(0, 1) if i % 17 else math.nan,
            sample=i,
            layer=None if i % 3 else f"блок.{i % 5}.'q\"",
            lower=rng.random(),
            upper=math.inf,
            status=Status.OK if i % 7 else Status.NOT_CONVERGED,
            num_iterations=i,
            seconds=rng.random(),
        )
        for i in range(num_rows)
    ]


def _shard(num_rows: int = 64, **changes: object) -> bytes:
    return encode_shard(_rows(num_rows), _unit(0, 64, num_rows=num_rows, **changes), CONSTANTS)


KEY = shard_key(SPEC, Block(range(0, 64)))


def test_row_columns_are_the_fields_of_a_row():
    assert {f.name for f in schema.ROW_FIELDS} == {f.name for f in dataclasses.fields(Row)}
    for field in dataclasses.fields(Row):
        nullable = schema.MEASUREMENT_SCHEMA.field(field.name).nullable
        assert nullable == ("None" in str(field.type)), field.name


def test_shard_reads_back_as_it_was_written():
    rows, unit = _rows(64), _unit(num_rows=64)
    table, read = decode_shard(encode_shard(rows, unit, CONSTANTS), key=KEY)
    assert read.model_dump_json() == unit.model_dump_json()
    assert table.schema.equals(schema.MEASUREMENT_SCHEMA)
    # repr, because NaN differs from itself and must not become null.
    lines = [{k: line[k] for k in dataclasses.asdict(rows[0])} for line in table.to_pylist()]
    assert repr(lines) == repr([dataclasses.asdict(r) | {"status": r.status.value} for r in rows])
    constant = table.drop_columns([f.name for f in schema.ROW_FIELDS]).to_pylist()
    assert constant == [
        {
            "spec_key": SPEC,
            "checkpoint": "vit_tiny.in1k",
            "family": "vision_transformer",
            "metric": "sensitivity",
            "label": "sensitivity",
            "series": None,
            "metric_version": 3,
            "code_version": "0.1.0",
            "torch_version": "2.6.0",
            "timm_version": "1.0.9",
        }
    ] * len(rows)


def test_the_same_rows_and_record_give_the_same_bytes():
    assert _shard() == _shard()
    assert _shard() != _shard(seconds=61.0)


def test_parquet_readers_without_flatcensus_read_a_shard(tmp_path: Path):
    import duckdb

    file = tmp_path / "shard.parquet"
    file.write_bytes(_shard())
    rows = duckdb.connect().execute(f"SELECT count(*), min(sample) FROM '{file}'").fetchall()
    assert rows == [(64, 0)]


def test_failure_shard_has_no_rows_and_says_why():
    unit = _failed(generation=2)
    data = encode_shard([], unit, CONSTANTS)
    table, read = decode_shard(data, key=shard_key(SPEC, Block(range(0, 64)), 2))
    assert table.num_rows == 0
    assert read.failure is not None
    assert (read.failure.class_, read.failure.hint) == ("oom", "smaller")
    assert '"class":"oom"' in read.model_dump_json(by_alias=True)


def test_failures_with_undecodable_text_are_recorded_anyway():
    failure = Failure(class_="load", type="OSError", message="no file '/data/\udcff.bin'")
    unit = _unit(status="failed", failure=failure)
    read = decode_shard(
        encode_shard([], unit, CONSTANTS), key=shard_key(SPEC, Block(range(0, 64)), 0)
    ).unit
    assert read.failure is not None
    assert read.failure.message == r"no file '/data/\udcff.bin'"


def test_text_that_looks_like_the_digest_does_not_confuse_it():
    mark = shard_file._MARK.decode("latin-1") + "0" * 64
    failure = Failure(class_="x", type="E", message=mark, traceback=mark)
    encode_shard([], _unit(status="failed", failure=failure), CONSTANTS)
    rows = [dataclasses.replace(row, layer=mark) for row in _rows(64)]
    data = encode_shard(rows, _unit(num_rows=64, label=mark), CONSTANTS)
    assert set(decode_shard(data, key=KEY).table["layer"].to_pylist()) == {mark}
    digest = pq.ParquetFile(pa.BufferReader(data)).metadata.metadata[b"flatcensus.sha256"]
    assert hashlib.sha256(data.replace(digest, b"0" * 64)).hexdigest().encode() == digest


def test_no_single_bit_flip_passes():
    data = _shard()
    place = shard_file._digest_place(data)
    assert place is not None
    rng = random.Random(1)
    # Everywhere at random, every bit of the digest and of the file's tail, and both ends.
    bits = {rng.randrange(8 * len(data)) for _ in range(3000)}
    bits |= set(range(8 * (place - 40), 8 * (place + 64)))
    bits |= set(range(8 * (len(data) - 16), 8 * len(data))) | set(range(64))
    for bit in sorted(bits):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ShardError, match=KEY):
            decode_shard(bytes(damaged), key=KEY)
    decode_shard(data, key=KEY)


def test_truncated_and_extended_files_are_refused():
    data = _shard()
    for length in [*range(80), *range(80, len(data), 97), *range(len(data) - 150, len(data))]:
        with pytest.raises(ShardError, match="truncated"):
            decode_shard(data[:length], key=KEY)
    for wrong in (data + b"\0", data + data, b"\0" + data, data[:4] + data, data[:-8] + data[-16:]):
        with pytest.raises(ShardError):
            decode_shard(wrong, key=KEY)


def test_other_parquet_files_are_refused():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), sink)
    with pytest.raises(ShardError, match="not a complete shard"):
        decode_shard(sink.getvalue().to_pybytes(), key=KEY)


@pytest.mark.parametrize(("version", "advice"), [(2, "update flatcensus"), (0, "resume")])
def test_another_schema_version_is_refused_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, version: int, advice: str
):
    data = _shard()
    monkeypatch.setattr(shard_file, "SCHEMA_VERSION", version)
    other = _shard()
    with pytest.raises(ShardError, match="schema version '1'"):
        decode_shard(data, key=KEY)
    monkeypatch.undo()
    with pytest.raises(ShardError, match=f"schema version '{version}'.* reads 1: .*{advice}"):
        decode_shard(other, key=KEY)


def test_a_shard_under_another_name_is_refused():
    for key in (
        shard_key(SPEC, Block(range(64, 128))),
        shard_key("other", Block(range(0, 64))),
        "quarantine/x.0",
    ):
        with pytest.raises(ShardError, match=f"was written as {KEY}"):
            decode_shard(_shard(), key=key)


def test_rows_that_do_not_fit_are_refused_when_written():
    with pytest.raises(ValueError, match="num_rows is 3, but there are 2"):
        encode_shard(_rows(2), _unit(num_rows=3), CONSTANTS)
    with pytest.raises(ValueError, match="'value' must have a value"):
        encode_shard(
            [dataclasses.replace(_rows(1)[0], value=None)],  # pyright: ignore[reportArgumentType]
            _unit(num_rows=1),
            CONSTANTS,
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 5, "stop": 5},
        {"start": -1},
        {"status": "failed"},
        {"failure": {"class": "x", "type": "E", "message": ""}},
        {"unknown": 1},
    ],
)
def test_inconsistent_records_are_refused(changes: dict[str, object]):
    with pytest.raises(ValueError, match="UnitRecord"):
        _unit(**changes)  # pyright: ignore[reportArgumentType]


def test_keys_and_names_are_inverse():
    for name in (
        ShardName(SPEC, 0, 64),
        ShardName("a b'\"ü", 7_000_000_000, 7_000_000_009, 12),
        ShardName(SPEC, 0, 64, None, 2, 8),
        ShardName(SPEC, 0, 64, 0, 2, 8),
    ):
        assert parse_key(name.key) == name
    assert ShardName(SPEC, 3, 9).block == Block(range(3, 9))
    for key in (
        "shards/a/0-1",
        "shards/a/1-1.parquet",
        "shards/a/00-1.parquet",
        "shards/a/b/0-1.parquet",
        "quarantine/a/0-1.parquet",
        "shards/a/0-1.failed-.parquet",
        "shards/a/0-1x0-1.parquet",
        "shards/a/0-1x2-2.parquet",
        "shards/a/0-1.parquet.0",
        "shards/a/0-1.parquet\n",
        "shards/a/٠-١.parquet",
    ):
        assert parse_key(key) is None


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def _fill(store: Store) -> list[str]:
    keys = []
    for spec, start in (("b", 0), ("a", 64), ("a", 0)):
        unit = _unit(start, start + 64, spec_key=spec, num_rows=2)
        keys.append(shard_key(spec, Block(range(start, start + 64))))
        store.put_new(keys[-1], encode_shard(_rows(2), unit, CONSTANTS))
    keys.append(shard_key("b", Block(range(64, 128)), 0))
    store.put_new(keys[-1], encode_shard([], _failed(64, 128, spec_key="b"), CONSTANTS))
    return sorted(keys)


def test_shards_are_listed_without_reading_them(store: Store, caplog: pytest.LogCaptureFixture):
    for key in ("shards/a/100-200.parquet", "shards/a/20-100.parquet", "shards/b/0-1.parquet"):
        store.put(key, b"not read")
    store.put(shard_key("a", Block(range(20, 100)), 1), b"")
    store.put("tables/summary.parquet", b"")
    expected = {
        "a": [ShardName("a", 20, 100), ShardName("a", 20, 100, 1), ShardName("a", 100, 200)],
        "b": [ShardName("b", 0, 1)],
    }
    assert list_shards(store) == expected
    assert list_shards(store, ["b", "c"]) == {"b": expected["b"]}
    assert caplog.messages == []
    store.put("shards/a/notes.txt", b"")
    assert list_shards(store) == expected
    assert "notes.txt" in caplog.text


def test_all_shards_are_read_in_order(store: Store):
    _fill(store)
    found = [(s.unit.spec_key, s.unit.start, s.table.num_rows) for s in read_shards(store)]
    assert found == [("a", 0, 2), ("a", 64, 2), ("b", 0, 2), ("b", 64, 0)]
    assert [s.unit.status for s in read_shards(store, {"b"})] == ["ok", "failed"]


def test_damaged_shards_are_set_aside_reported_and_pending_again(
    store: Store, caplog: pytest.LogCaptureFixture
):
    _fill(store)
    good = store.get(shard_key("a", Block(range(0, 64))))
    for attempt in range(2):
        store.put(shard_key("a", Block(range(0, 64))), good[:-1])
        report: list[Quarantined] = []
        read = list(read_shards(store, quarantined=report))
        assert [(s.unit.spec_key, s.unit.start) for s in read] == [("a", 64), ("b", 0), ("b", 64)]
        moved_to = f"quarantine/a/0-64.parquet.{attempt}"
        assert [(q.key, q.moved_to) for q in report] == [
            (shard_key("a", Block(range(0, 64))), moved_to)
        ]
        assert "truncated" in report[0].reason
        assert moved_to in caplog.text
        assert store.get(moved_to) == good[:-1]
        names = list_shards(store)["a"]
        assert missing_blocks(Block(range(128)), [n.block for n in names]) == [Block(range(64))]


def test_records_of_damaged_shards_are_not_used_whatever_bit_has_turned(store: Store):
    """Half of the flips are in the footer, where Parquet's readers fail in many ways."""
    key = _fill(store)[0]
    sound = store.get(key)
    assert peek_record(store, key) is not None
    footer = len(sound) - int.from_bytes(sound[-8:-4], "little")
    rng = random.Random(0)
    for first in (0, footer):
        for place in (rng.randrange(first, len(sound)) for _ in range(150)):
            data = bytearray(sound)
            data[place] ^= 1 << rng.randrange(8)
            store.put(key, bytes(data))
            assert peek_record(store, key) is None, place


def test_damaged_shards_can_be_raised_instead(store: Store):
    keys = _fill(store)
    store.put(keys[1], store.get(keys[1])[:-1])
    with pytest.raises(ShardError) as caught:
        list(read_shards(store, on_corrupt="raise"))
    assert caught.value.key == keys[1]
    assert store.list() == keys


def test_a_shard_that_another_reader_set_aside_is_skipped(store: Store):
    _fill(store)
    reader = read_shards(store)
    next(reader)
    set_aside(store, ShardName("b", 0, 64).key)
    assert [(s.unit.spec_key, s.unit.start) for s in reader] == [("a", 64), ("b", 64)]
