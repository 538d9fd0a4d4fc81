"""The run folder: exclusive creation, atomic replacement, keys, and what crashes leave behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from pipeline.errors import StoreError
from pipeline.store import MissingKeyError, Store, open_store

NUM_KEYS = 200
ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "run")


def _files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_put_new_publishes_once_and_never_replaces(store: Store):
    assert store.put_new("shards/a/0-1.parquet", b"first")
    assert not store.put_new("shards/a/0-1.parquet", b"second")
    assert store.get("shards/a/0-1.parquet") == b"first"
    assert _files(store.path("shards")) == ["a/0-1.parquet"]


def test_put_replaces_and_leaves_no_temporary(store: Store):
    store.put("tables/summary.parquet", b"old")
    store.put("tables/summary.parquet", b"new")
    assert store.get("tables/summary.parquet") == b"new"
    assert _files(store.path("tables")) == ["summary.parquet"]


def test_racing_threads_have_exactly_one_winner_per_key(store: Store):
    num_writers, start = 4, Barrier(4)

    def write(writer: int) -> list[bool]:
        won = []
        for key in range(NUM_KEYS):
            start.wait()
            won.append(store.put_new(f"race/{key}", b"%d" % writer))
        return won

    with ThreadPoolExecutor(num_writers) as pool:
        won = list(pool.map(write, range(num_writers)))
    for key in range(NUM_KEYS):
        winners = [writer for writer in range(num_writers) if won[writer][key]]
        assert len(winners) == 1
        assert store.get(f"race/{key}") == b"%d" % winners[0]


RACER = f"""
import sys
from pipeline.store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for key in range({NUM_KEYS}):
    if store.put_new(f"race/{{key}}", sys.argv[2].encode()):
        print(key)
"""


def test_racing_processes_have_exactly_one_winner_per_key(store: Store, tmp_path: Path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path / "run"), name],
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
    assert sorted(won[0] + won[1], key=int) == [str(key) for key in range(NUM_KEYS)]
    for name, keys in zip((b"one", b"two"), won, strict=True):
        assert all(store.get(f"race/{key}") == name for key in keys)


CRASHER = """
import os, sys
from pipeline.store import open_store
real = getattr(os, sys.argv[2])
def crash(*args):
    if sys.argv[3] == "after":
        real(*args)
    os._exit(9)
setattr(os, sys.argv[2], crash)
open_store(sys.argv[1]).put_new("shards/a/0-1.parquet", b"data")
"""


@pytest.mark.parametrize(
    ("step", "when", "published"),
    [("fsync", "before", False), ("link", "before", False), ("link", "after", True)],
)
def test_crash_between_steps_leaves_a_hidden_file_that_is_never_listed(
    store: Store, tmp_path: Path, step: str, when: str, published: bool
):
    store.put("shards/a/other", b"so that the directory exists")
    root = str(tmp_path / "run")
    crashed = subprocess.run(
        [sys.executable, "-c", CRASHER, root, step, when], check=False, cwd=ROOT
    )
    assert crashed.returncode == 9
    assert len(_files(store.path("shards/a"))) == 2 + published
    key = "shards/a/0-1.parquet"
    assert store.list() == ([key] if published else []) + ["shards/a/other"]
    assert store.put_new(key, b"data") is not published
    assert store.get(key) == b"data"
    assert store.clean_temporaries(older_than_seconds=3600) == 0
    assert store.clean_temporaries(older_than_seconds=0) == 1
    assert _files(store.path("shards/a")) == ["0-1.parquet", "other"]


def test_clean_temporaries_goes_by_age(store: Store):
    store.put("a/b", b"")
    old, young = store.path("a").parent / ".tmp-1-x", store.path("a") / ".tmp-2-y"
    for file, age in ((old, 100), (young, 10)):
        file.write_bytes(b"")
        os.utime(file, (time.time() - age, time.time() - age))
    assert store.clean_temporaries(older_than_seconds=50) == 1
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("reported", [errno.EEXIST, errno.EIO])
def test_a_link_that_succeeded_but_was_reported_as_failed_counts_as_created(
    store: Store, monkeypatch: pytest.MonkeyPatch, reported: int
):
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise OSError(reported, os.strerror(reported))

    monkeypatch.setattr(os, "link", link)
    assert store.put_new("a", b"data")
    assert store.get("a") == b"data"


def test_a_link_that_failed_is_an_error_and_publishes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match="input/output error"):
        store.put_new("a", b"data")
    assert store.list() == []
    assert _files(store.path("a").parent) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("method", ["put", "put_new"])
def test_full_disk_is_told_apart_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, method: str
):
    store.put("a/other", b"")

    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match=r"cannot \w+ .*a/b: .*Free some space") as caught:
        getattr(store, method)("a/b", b"data")
    assert caught.value.disk_full
    assert _files(store.path("a")) == ["other"]


def test_list_is_sorted_and_filters_by_any_prefix(store: Store):
    for key in ("b", "a/2", "a/10", "ab/x", "a/c/1"):
        store.put(key, b"")
    (store.path("a") / ".hidden").touch()
    assert store.list() == ["a/10", "a/2", "a/c/1", "ab/x", "b"]
    assert store.list("a") == ["a/10", "a/2", "a/c/1", "ab/x"]
    assert store.list("a/") == ["a/10", "a/2", "a/c/1"]
    assert store.list("a/1") == ["a/10"]
    assert store.list("b/") == []
    assert store.list("none/at/all") == []


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


def test_missing_object_has_its_own_error(store: Store):
    with pytest.raises(MissingKeyError, match=r"cannot read .*nowhere/x"):
        store.get("nowhere/x")
    assert not store.exists("nowhere/x")


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a/.tmp-1", "a\\b", "a\0b", "a\nb"],
)
def test_keys_cannot_leave_the_root_or_hide(store: Store, key: str):
    for call in (store.get, store.exists, store.path, lambda k: store.put(k, b"")):
        with pytest.raises(StoreError, match="cannot be a key"):
            call(key)
    with pytest.raises(StoreError, match="cannot be a key"):
        store.move("a", key)


def test_names_too_long_for_the_file_system_are_refused(store: Store):
    store.put("ß" * 127, b"")
    with pytest.raises(StoreError, match="cannot be a key"):
        store.put("ß" * 128, b"")


def test_list_cannot_leave_the_root(store: Store):
    for prefix in ("../", "/etc/", "a/../../"):
        with pytest.raises(StoreError, match="cannot be a key"):
            store.list(prefix)


def test_unicode_keys_work(store: Store):
    key = "tables/größe 'ß' \"模型\""
    assert store.put_new(key, b"x")
    assert store.list("tables/gr") == [key]


def test_probe_accepts_a_good_directory_and_leaves_nothing(store: Store):
    store.probe()
    assert _files(store.path("x").parent) == []
    assert store.list() == []


def test_probe_refuses_a_file_system_that_overwrites(store: Store, monkeypatch: pytest.MonkeyPatch):
    def link(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match="created twice"):
        store.probe()


def test_probe_says_what_is_wrong_with_the_place(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="not a directory"):
        open_store(tmp_path / "file").probe()
    with pytest.raises(StoreError, match="not a directory"):
        open_store(tmp_path / "file" / "run").probe()
    with pytest.raises(StoreError, match="not a directory"):
        open_store(tmp_path / "file").list()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_probe_reports_a_place_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def mkdir(self: Path) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(StoreError, match=r"read-only|permission|full") as caught:
        open_store(tmp_path / "run").probe()
    assert caught.value.disk_full == (code == errno.ENOSPC)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_probe_reports_a_directory_without_permission(tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="permission denied"):
        open_store(tmp_path / "locked" / "run").probe()


def test_open_store_takes_paths_and_file_uris_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    expected = tmp_path / "my run" / "x"
    for uri in ("my run", tmp_path / "my run", f"file://{tmp_path}/my%20run"):
        assert open_store(uri).path("x") == expected
    for uri in ("s3://bucket/run", "file://host/run", "file://", "http://x/y"):
        with pytest.raises(StoreError, match="expected a local or mounted directory"):
            open_store(uri)
    assert list(tmp_path.iterdir()) == []
