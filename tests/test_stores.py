"""What every run folder promises, on a directory and on real S3 servers alike."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from races import require_one_winner_per_key
from s3_servers import BUCKET, CONDITIONAL, s3_environment, s3_server

from pipeline.errors import StoreError
from pipeline.store import PROBE, MissingKeyError, Store, open_store

ROOT = Path(__file__).parents[1]
KINDS = ("local", *CONDITIONAL)


@pytest.fixture(scope="module", params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], str]]:
    """Gives URIs of empty run folders of one kind."""
    folder, number = tmp_path_factory.mktemp("stores"), iter(range(10**6))
    if request.param == "local":
        yield lambda: str(folder / f"run{next(number)}")
        return
    with (
        s3_server(request.param, folder / "server") as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        for variable, value in s3_environment(address).items():
            patch.setenv(variable, value)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield lambda: f"s3://{BUCKET}/runs/{next(number)}"


@pytest.fixture
def store(place: Callable[[], str]) -> Store:
    return open_store(place())


def test_put_new_publishes_once_and_never_replaces(store: Store):
    assert store.put_new("shards/a/0-1.parquet", b"first")
    assert not store.put_new("shards/a/0-1.parquet", b"second")
    assert store.get("shards/a/0-1.parquet") == b"first"
    assert store.list() == ["shards/a/0-1.parquet"]


def test_put_replaces_in_one_step(store: Store):
    store.put("tables/summary.parquet", b"old")
    store.put("tables/summary.parquet", b"new")
    assert store.get("tables/summary.parquet") == b"new"
    assert store.list() == ["tables/summary.parquet"]


def test_another_process_opens_the_store_by_its_uri(store: Store):
    store.put("a", b"1")
    assert open_store(store.uri).get("a") == b"1"
    assert open_store(f"{store.uri}/").uri == store.uri


def test_objects_of_any_size_come_back_as_they_were(store: Store):
    for size in (0, 1, 20 * 2**20 + 1):
        data = os.urandom(size)
        assert store.put_new(f"sizes/{size}", data)
        assert store.get(f"sizes/{size}") == data
    assert [entry.size for entry in store.entries("sizes/")] == [0, 1, 20 * 2**20 + 1]


def test_twelve_writers_at_once_have_exactly_one_winner_per_key(store: Store):
    require_one_winner_per_key(store, num_writers=12, num_keys=40)


RACER = """
import sys
from pipeline.store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for key in range(100):
    if store.put_new(f"race/{key}", sys.argv[2].encode()):
        print(key)
"""


def test_racing_processes_have_exactly_one_winner_per_key(store: Store):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, store.uri, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name in ("one", "two")
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert sorted(won[0] + won[1], key=int) == [str(key) for key in range(100)]
    for name, keys in zip((b"one", b"two"), won, strict=True):
        assert all(store.get(f"race/{key}") == name for key in keys)


def test_readers_see_the_old_or_the_new_object_and_nothing_between(store: Store):
    size, done, seen = 2**20, threading.Event(), set()
    store.put("tables/a", b"0" * size)

    def read() -> None:
        while not done.is_set():
            data = store.get("tables/a")
            assert len(data) == size
            assert data == data[:1] * size
            seen.add(data[:1])

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        for number in range(12):
            store.put("tables/a", b"%d" % (number % 10) * size)
        done.set()
        for reader in readers:
            reader.result()
    assert seen


def test_who_finds_a_new_object_finds_all_of_it(store: Store):
    size, num_objects, done = 2**21, 10, threading.Event()

    def read() -> set[str]:
        seen: set[str] = set()
        while not done.is_set() or len(seen) < num_objects:
            for key in store.list("shards/"):
                if key not in seen:
                    data = store.get(key)
                    assert data == key[-1:].encode() * size
                    seen.add(key)
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for number in range(num_objects):
            store.put_new(f"shards/{number}", b"%d" % number * size)
        done.set()
        assert all(len(reader.result(timeout=60)) == num_objects for reader in readers)


def test_list_is_sorted_and_filters_by_any_prefix(store: Store):
    for key in ("b", "a/2", "a/10", "ab/x", "a/c/1"):
        store.put(key, b"")
    assert store.list() == ["a/10", "a/2", "a/c/1", "ab/x", "b"]
    assert store.list("a") == ["a/10", "a/2", "a/c/1", "ab/x"]
    assert store.list("a/") == ["a/10", "a/2", "a/c/1"]
    assert store.list("a/1") == ["a/10"]
    assert store.list("b/") == []
    assert store.list("none/at/all") == []
    assert [entry.key for entry in store.entries("a/")] == store.list("a/")


def test_listings_of_more_than_a_page_are_complete(store: Store):
    keys = sorted(f"many/{number % 7}/{number}" for number in range(1100))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert store.list("many/") == keys


def test_stamps_tell_rewritten_objects_from_untouched_ones(store: Store):
    store.put("a", b"1")
    store.put("b", b"1")
    before = {entry.key: entry for entry in store.entries()}
    store.put("a", b"2")
    after = {entry.key: entry for entry in store.entries()}
    assert before["a"] != after["a"]
    assert before["a"].size == after["a"].size == 1
    assert before["b"] == after["b"]


def test_move_never_replaces(store: Store):
    store.put("a", b"1")
    store.put("q/a", b"2")
    assert not store.move("a", "q/a")
    assert (store.get("a"), store.get("q/a")) == (b"1", b"2")
    assert store.move("a", "r/s/a")
    assert not store.exists("a")
    assert store.get("r/s/a") == b"1"
    with pytest.raises(MissingKeyError):
        store.move("a", "b")


def test_deleted_objects_are_gone_and_deleting_again_is_no_error(store: Store):
    store.put("a/b", b"1")
    store.put("c", b"1")
    for _ in range(2):
        store.delete("a/b")
    assert not store.exists("a/b")
    assert store.list() == ["c"]
    assert store.put_new("a/b", b"2")
    assert store.get("a/b") == b"2"


def test_missing_object_has_its_own_error(store: Store):
    with pytest.raises(MissingKeyError, match=r"cannot read .*nowhere/x"):
        store.get("nowhere/x")
    assert not store.exists("nowhere/x")


def test_local_folder_holds_the_objects_below_a_prefix(store: Store):
    store.put("checkpoints/k/config.json", b"{}")
    store.put("checkpoints/k/deep/er", b"2")
    store.put("checkpoints/key/other", b"3")
    folder = store.local_folder("checkpoints/k")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == ["config.json", "deep/er"]
    assert (folder / "deep/er").read_bytes() == b"2"
    assert folder.name == "k"
    assert store.local_folder("checkpoints/k") == folder


def test_local_folder_follows_what_is_rewritten(store: Store):
    for content in (b"1", b"2"):
        store.put("checkpoints/k/model", content)
        assert (store.local_folder("checkpoints/k") / "model").read_bytes() == content


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a/.tmp-1", "a\\b", "a\0b", "a\nb"],
)
def test_keys_cannot_leave_the_root_or_hide(store: Store, key: str):
    calls = (store.get, store.exists, store.delete, store.local_folder)
    for call in (*calls, lambda k: store.put(k, b""), lambda k: store.put_new(k, b"")):
        with pytest.raises(StoreError, match="cannot be a key"):
            call(key)
    with pytest.raises(StoreError, match="cannot be a key"):
        store.move("a", key)


def test_names_too_long_for_a_file_system_are_refused(store: Store):
    store.put("ß" * 127, b"")
    with pytest.raises(StoreError, match="cannot be a key"):
        store.put("ß" * 128, b"")


def test_list_cannot_leave_the_root(store: Store):
    for prefix in ("../", "/etc/", "a/../../"):
        with pytest.raises(StoreError, match="cannot be a key"):
            store.list(prefix)


def test_keys_may_hold_what_people_call_things(store: Store):
    keys = sorted(
        [
            "tables/größe 'ß' \"模型\"",
            "t/a+b c%20d",
            "t/a?b#c&d=e",
            "t/~[x]{y}@:,;$!(*)",
            "t/x=1.5%",
        ]
    )
    for key in keys:
        assert store.put_new(key, key.encode())
    assert store.list() == keys
    assert all(store.get(key) == key.encode() for key in keys)


def test_probe_accepts_it_and_leaves_nothing(store: Store):
    store.probe()
    assert store.list() == []
    assert store.clean_temporaries(older_than_seconds=0) == 0


def test_what_a_killed_probe_left_is_a_temporary(store: Store):
    store.put(f"{PROBE}/0123", b"first")
    store.put("a", b"1")
    assert store.clean_temporaries(older_than_seconds=3600) == 0
    assert store.clean_temporaries(older_than_seconds=-3600) == 1
    assert store.list() == ["a"]


def test_probes_of_several_launches_at_once_do_not_disturb_each_other(store: Store):
    with ThreadPoolExecutor(4) as pool:
        for probe in [pool.submit(open_store(store.uri).probe) for _ in range(4)]:
            probe.result()
    assert store.list() == []
