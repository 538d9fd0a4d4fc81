"""Packs: nothing changes by packing, nothing is lost by being killed, damaged or repeated."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from synthetic import fill_with_packs, fill_with_shards

from pipeline import compact as compacting
from pipeline import pack_file, packs
from pipeline.compact import MANY, compact, pack_if_many
from pipeline.errors import ShardError, StoreError
from pipeline.pack_index import decode_index
from pipeline.packs import list_packs
from pipeline.schema import Constants, Failure, UnitRecord
from pipeline.shard_file import set_aside
from pipeline.shards import (
    decode_shard,
    encode_shard,
    has_shard,
    list_shards,
    peek_record,
    read_shards,
    shard_key,
    verify,
)
from pipeline.store import Store, open_store
from pipeline.unit_table import record_table, records_of
from tasks.block import Block
from tasks.measurement import Row

GROUP = 4
NUM_UNITS = 36
CONSTANTS = Constants(metric_version=1, code_version="0", torch_version="0", timm_version="0")


@pytest.fixture(autouse=True)
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of 16 units in groups of 4, so that few units make several of each."""
    monkeypatch.setattr(pack_file, "GROUP_UNITS", GROUP)
    for module in (pack_file, compacting):
        monkeypatch.setattr(module, "MAX_UNITS", 16)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """36 loose units of 4 specs, among them draws, two failures, and one unit without rows."""
    root = tmp_path_factory.mktemp("filled")
    store = open_store(root)
    names = fill_with_shards(store, NUM_UNITS - 4, units_per_spec=10, rows_per_unit=3)
    template = decode_shard(store.get(names[0].key), key=names[0].key).unit
    for start, draws, changes in (
        (900, range(2, 5), {}),
        (903, range(1), {"num_rows": 0}),
        (900, range(2, 5), failed(generation=1)),
        (906, range(1), failed()),
    ):
        record = template.model_copy(
            update={
                "start": start, "stop": start + 3, "draw_start": draws.start,
                "draw_stop": draws.stop, "num_rows": 3, **changes,
            }
        )  # fmt: skip
        put(store, record)
    return root


def failed(**changes: object) -> dict[str, object]:
    failure = Failure(class_="memory", type="MemoryError", message="no memory 'ü\"", hint="less")
    return {"status": "failed", "failure": failure, "num_rows": 0} | changes


def put(store: Store, record: UnitRecord, value: float = 1.0) -> str:
    rows = [
        Row("size", value + i if i else math.nan, sample=record.start + i, draw=record.draw_start)
        for i in range(record.num_rows)
    ]
    generation = record.generation if record.status == "failed" else None
    key = shard_key(record.spec_key, record.block, generation)
    store.put_new(key, encode_shard(rows, record, CONSTANTS))
    return key


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Store:
    shutil.copytree(filled, tmp_path / "run")
    return open_store(tmp_path / "run")


def state(store: Store) -> dict[str, str]:
    """Everything that readers see, by unit; fails if they see one twice."""
    found: dict[str, str] = {}
    for table, unit in read_shards(store):
        generation = unit.generation if unit.status == "failed" else None
        key = shard_key(unit.spec_key, unit.block, generation)
        assert key not in found
        rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        found[key] = f"{unit.model_dump_json()} {rows!r}"
    listed = [name.key for names in list_shards(store).values() for name in names]
    assert sorted(listed) == sorted(found)
    return found


def loose(store: Store) -> list[str]:
    return store.list("shards/")


def test_packing_moves_all_units_and_changes_none(store: Store):
    before = state(store)
    done = compact(store)
    assert (done.num_units, done.num_packs) == (NUM_UNITS, 3)
    assert loose(store) == []
    assert state(store) == before
    assert [p.index.num_units for p in list_packs(store)] == [16, 16, 4]
    assert verify(store) == []
    assert {p.partition("/")[0] for p in store.list()} == {"packs"}


def test_packing_again_does_nothing(store: Store):
    compact(store)
    before = store.entries()
    done = compact(store)
    assert (done.num_units, done.num_packs, done.num_merged) == (0, 0, 0)
    assert store.entries() == before


def test_small_packs_are_merged_with_what_came_later(store: Store):
    compact(store)
    record = next(iter(read_shards(store))).unit
    for start in (1000, 1003):
        put(store, record.model_copy(update={"start": start, "stop": start + 3}))
    before = state(store)
    done = compact(store)
    assert (done.num_units, done.num_packs, done.num_merged) == (2, 1, 1)
    assert state(store) == before
    assert [p.index.num_units for p in list_packs(store)] == [16, 16, 6]


def test_any_parquet_reader_reads_a_pack(store: Store):
    compact(store)
    run = Path(store.uri)
    query = (
        f"SELECT count(*), count(DISTINCT spec_key), sum(num_rows) "
        f"FROM '{run}/packs/*.units.parquet'"
    )
    assert duckdb.sql(query).fetchall() == [(NUM_UNITS, 4, 99)]
    assert duckdb.sql(f"SELECT count(*) FROM '{run}/packs/*.rows.parquet'").fetchall() == [(99,)]


def test_units_that_are_packed_are_done_and_their_records_can_be_looked_at(store: Store):
    compact(store)
    first = next(iter(read_shards(store))).unit
    assert has_shard(store, first.spec_key, first.block)
    assert not has_shard(store, first.spec_key, Block(range(5000, 5001)))
    found = peek_record(store, shard_key(first.spec_key, first.block))
    assert found is not None
    assert found.model_dump_json() == first.model_dump_json()
    assert peek_record(store, shard_key(first.spec_key, Block(range(5000, 5001)))) is None


def test_a_reader_sees_each_unit_once_while_shards_are_packed(store: Store):
    before = state(store)
    reader = read_shards(store)
    seen = [next(reader).unit]
    compact(store)
    seen += [shard.unit for shard in reader]
    assert len(seen) == len({(u.spec_key, u.block, u.status) for u in seen}) == len(before)


class Killed(BaseException):
    """As SIGKILL: nobody may handle it."""


class Failing:
    """A store whose n-th change is the last thing that happens, or just does not."""

    def __init__(self, store: Store, last: int, *, before: bool) -> None:
        self.store, self.left, self.before = store, last, before
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)
        if name not in ("put_new", "put", "move", "delete"):
            return method

        def counted(*arguments: object) -> Any:
            with self.lock:
                self.left -= 1
                if self.left < 0 or (self.left == 0 and self.before):
                    raise Killed
                result = method(*arguments)
                if self.left == 0:
                    raise Killed
                return result

        return counted


def test_a_compaction_that_is_killed_anywhere_loses_nothing_and_the_next_completes_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = state(store)
    # A damaged shard, a late duplicate and a small pack take part as well.
    monkeypatch.setattr(compacting, "GARBAGE_AGE", timedelta(0))
    steps = 0
    while True:
        steps += 1
        completed = 0
        for order in (True, False):
            root = tmp_path / f"killed{steps}{order}"
            shutil.copytree(store.uri, root)
            victim = open_store(root)
            try:
                compact(Failing(victim, steps, before=order))  # pyright: ignore[reportArgumentType]
                completed += 1
            except Killed:
                pass
            assert state(victim) == before
            done = compact(victim)
            assert not done.quarantined
            assert state(victim) == before
            assert loose(victim) == []
            used = {k for p in list_packs(victim) for k in (p.index.key, *p.index.keys)}
            assert set(victim.list("packs/")) == used
            assert {key.partition("/")[0] for key in victim.list()} == {"packs"}
            shutil.rmtree(root)
        if completed:
            break
        # Of the deletions, which are alike, a few will do.
        steps += 5 if 8 < steps < 40 else 0
    assert steps > 40


def test_compactions_at_once_beside_writers_and_readers_lose_nothing(store: Store):
    before = state(store)
    record = next(iter(read_shards(store))).unit
    late = [
        record.model_copy(update={"start": start, "stop": start + 3})
        for start in range(2000, 2090, 3)
    ]
    problems: list[BaseException] = []
    writing = threading.Event()

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    def write() -> None:
        for unit in late:
            put(open_store(store.uri), unit)
        writing.set()

    def pack() -> None:
        while not writing.is_set():
            compact(open_store(store.uri))

    def read() -> None:
        while not writing.is_set():
            found = state_now(open_store(store.uri))
            assert {key: found.get(key) for key in before} == before

    workers = [threading.Thread(target=guarded, args=(f,)) for f in (write, pack, pack, read)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert problems == []
    done = compact(store)
    assert not done.quarantined
    after = state(store)
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + len(late)
    assert loose(store) == []


def state_now(store: Store) -> dict[str, str]:
    """As ``state``, while others add units."""
    found: dict[str, str] = {}
    for table, unit in read_shards(store):
        generation = unit.generation if unit.status == "failed" else None
        rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        key = shard_key(unit.spec_key, unit.block, generation)
        found[key] = f"{unit.model_dump_json()} {rows!r}"
    return found


def test_compactions_of_several_processes_at_once_lose_nothing(store: Store):
    before = state(store)
    code = (
        "import sys\n"
        "from pipeline.compact import compact\n"
        "from pipeline.store import open_store\n"
        "assert not compact(open_store(sys.argv[1])).quarantined\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, store.uri]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert state(store) == before
    assert loose(store) == []
    compact(store)
    assert state(store) == before


def test_packs_of_the_same_units_are_seen_once_and_the_older_are_removed(
    store: Store, tmp_path: Path
):
    """As two machines leave them, of which one knew more units than the other."""
    before = state(store)
    shutil.copytree(store.uri, tmp_path / "other")
    other = open_store(tmp_path / "other")
    some = sorted(before)[:20]
    for key in set(before) - set(some):
        other.delete(key)
    compact(other)
    compact(store)
    for path in (tmp_path / "other/packs").iterdir():
        if not store.exists(f"packs/{path.name}"):
            shutil.copy(path, Path(store.uri) / "packs")
    assert state(store) == before
    assert sum(p.index.num_units for p in list_packs(store)) > len(before)
    compact(store)
    assert state(store) == before
    assert sum(p.index.num_units for p in list_packs(store)) < len(before) + 16


def test_a_late_duplicate_that_is_equal_is_dropped(store: Store):
    before = state(store)
    key = sorted(before)[0]
    data = store.get(key)
    compact(store)
    store.put_new(key, data)
    assert state(store) == before
    done = compact(store)
    assert (done.num_duplicates, done.nondeterminism) == (1, [])
    assert state(store) == before
    assert loose(store) == []


def test_a_late_duplicate_with_other_numbers_is_reported_and_the_first_one_kept(store: Store):
    before = state(store)
    unit = next(iter(read_shards(store))).unit
    compact(store)
    key = put(store, unit, value=7.0)
    assert state(store) == before
    done = compact(store)
    (item,) = done.nondeterminism
    assert item.key == key
    assert "other numbers" in item.reason
    assert store.exists(item.moved_to)
    assert state(store) == before
    assert loose(store) == []


def test_a_shard_that_was_computed_anew_is_not_deleted_with_the_one_that_was_packed(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Quarantined by somebody else and done again, between reading and deleting."""
    unit = next(iter(read_shards(store))).unit
    key = shard_key(unit.spec_key, unit.block)

    def publish(*arguments: Any) -> Any:
        if store.exists(key):
            set_aside(store, key)
            put(store, unit, value=7.0)
        return packs.publish(*arguments)

    monkeypatch.setattr(compacting, "publish", publish)
    compact(store)
    assert loose(store) == [key]
    monkeypatch.undo()
    assert len(compact(store).nondeterminism) == 1


def files_of_packs(store: Store) -> Iterator[tuple[str, str]]:
    pack = list_packs(store)[0]
    kinds = ("index", "rows", "units", "copy")
    yield from zip(kinds, (pack.index.key, *pack.index.keys), strict=True)


@pytest.mark.parametrize("kind", ["index", "rows", "units", "copy"])
def test_no_flipped_bit_passes_and_the_loss_is_small(store: Store, tmp_path: Path, kind: str):
    compact(store)
    before, rng = state(store), random.Random(kind)
    key = dict(files_of_packs(store))[kind]
    good = store.get(key)
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for number in range(12):
        root = tmp_path / f"{kind}{number}"
        shutil.copytree(store.uri, root)
        damaged, victim = bytearray(good), open_store(root)
        place = rng.randrange(len(good))
        damaged[place] ^= 1 << rng.randrange(8)
        (root / key).write_bytes(damaged)
        found = verify(victim) if number % 2 else []
        after = state(victim)
        assert all(before[unit] == text for unit, text in after.items())
        in_footer = kind in ("rows", "units") and place >= footer
        assert len(before) - len(after) <= (16 if in_footer else GROUP)
        if kind in ("index", "copy"):
            assert after == before
        if number % 2:
            (item,) = found
            assert victim.exists(item.moved_to)
        assert verify(victim) == [] or kind == "copy"
        shutil.rmtree(root)


@pytest.mark.parametrize("kind", ["rows", "units", "copy"])
def test_a_file_that_is_missing_is_noticed(store: Store, kind: str):
    compact(store)
    before = state(store)
    store.delete(dict(files_of_packs(store))[kind])
    found = verify(store)
    after = state(store)
    if kind == "copy":
        assert (found, after) == ([], before)
    else:
        assert f"{kind}.parquet is missing" in found[0].reason
        assert "16 of its 16 units are to do again" in found[0].reason
        assert len(after) == len(before) - 16
    assert verify(store) == []


def test_an_index_and_its_copy_that_are_both_damaged_cost_one_pack(store: Store):
    compact(store)
    before, named = state(store), dict(files_of_packs(store))
    for kind in ("index", "copy"):
        store.put(named[kind], store.get(named[kind])[:-3])
    (item,) = verify(store)
    assert "to do again" in item.reason
    assert len(state(store)) == len(before) - 16


def test_damaged_packs_can_be_raised_instead(store: Store):
    compact(store)
    key = dict(files_of_packs(store))["rows"]
    store.put(key, store.get(key)[:-3])
    before = store.list()
    with pytest.raises(ShardError, match=r"SHA-256 of .* differ"):
        list(read_shards(store, on_corrupt="raise"))
    assert store.list() == before


def test_a_damaged_shard_is_set_aside_and_the_others_are_packed(store: Store):
    before = state(store)
    key = sorted(before)[3]
    store.put(key, store.get(key)[:-1] + b"?")
    (item,) = compact(store).quarantined
    assert item.key == key
    del before[key]
    assert state(store) == before


def test_verify_reads_what_is_new_only(store: Store):
    compact(store)
    known: set[str] = set()
    assert verify(store, known) == []
    counted = Counting(store)
    assert verify(counted, known) == []  # pyright: ignore[reportArgumentType]
    assert counted.keys == []
    put(store, next(iter(read_shards(store))).unit.model_copy(update={"start": 700, "stop": 703}))
    assert verify(counted, known) == []  # pyright: ignore[reportArgumentType]
    assert len(counted.keys) == 1


class Counting:
    """A store that remembers what was read."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.keys: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str) -> bytes:
        self.keys.append(key)
        return self.store.get(key)


def test_files_that_nobody_names_are_removed_when_they_are_old(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    compact(store)
    left = "packs/0123456789abcdef01234567-20260101T000000.000000Z-01234567.rows.parquet"
    fresh = left.replace("20260101", "29990101")
    for key in (left, fresh, "packs/notes.txt"):
        store.put(key, b"x")
    compact(store)
    assert not store.exists(left)
    assert store.exists(fresh)
    assert store.exists("packs/notes.txt")


def test_few_shards_stay_as_they_are(store: Store, monkeypatch: pytest.MonkeyPatch):
    assert pack_if_many(store) is None
    assert len(loose(store)) == NUM_UNITS <= MANY
    monkeypatch.setattr(compacting, "MANY", NUM_UNITS - 1)
    assert pack_if_many(store) is not None
    assert loose(store) == []


def test_a_full_disk_stops_no_reduction(store: Store, monkeypatch: pytest.MonkeyPatch, caplog):
    def full(*_: object) -> None:
        raise StoreError("no space", disk_full=True)

    before = state(store)
    monkeypatch.setattr(compacting, "MANY", 1)
    monkeypatch.setattr(compacting, "publish", full)
    assert pack_if_many(store) is None
    assert "were not packed: no space" in caplog.text
    assert state(store) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pack_version": 2}, "update flatcensus"),
        ({"groups": [[99, 1]]}, "not valid"),
        ({"rows": {"key": "manifest.toml", "segments": []}}, "not (under its own|valid)"),
        ({"names": [1]}, "not valid"),
    ],
)
def test_forged_indexes_are_refused(store: Store, change: dict[str, Any], message: str):
    compact(store)
    key = list_packs(store)[0].index.key
    body = json.loads(store.get(key))
    del body["sha256"]
    body |= change
    dumped = json.dumps(body, separators=(",", ":")).encode()
    body["sha256"] = pack_file.sha256(dumped)
    forged = json.dumps(body, separators=(",", ":")).encode()
    with pytest.raises(ShardError, match=message):
        decode_index(forged, key=key)


def test_an_index_names_no_files_but_its_own(store: Store):
    compact(store)
    index = list_packs(store)[0].index
    stolen = dataclasses.replace(index, rows=index.rows._replace(key="manifest.toml"))
    with pytest.raises(ShardError, match="do not belong together"):
        decode_index(pack_file.encode_index(stolen), key=index.key)


def test_records_are_the_same_as_lines_of_a_table(filled: Path):
    records = [shard.unit for shard in read_shards(open_store(filled))]
    records[0] = records[0].model_copy(
        update={"self_test": {"error": math.nan, "nested": [1, {"a": None}]}, "self_tested": True}
    )
    again = records_of(record_table(records))
    assert [r.model_dump_json() for r in again] == [r.model_dump_json() for r in records]


def test_made_up_packs_are_sound(tmp_path: Path):
    """Other tests rest on them."""
    store = open_store(tmp_path)
    fill_with_packs(store, 50, units_per_spec=20, rows_per_unit=2)
    assert verify(store) == []
    assert len(state(store)) == 50
