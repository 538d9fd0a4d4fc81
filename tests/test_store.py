"""The run folder on a file system: what crashes leave behind, full disks, odd file systems."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.local_store import LocalStore
from pipeline.store import open_store

ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def _files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_a_publication_leaves_one_file_and_no_temporary(store: LocalStore):
    assert store.put_new("shards/a/0-1.parquet", b"first")
    assert not store.put_new("shards/a/0-1.parquet", b"second")
    store.put("shards/b", b"old")
    store.put("shards/b", b"new")
    assert _files(store.path("shards")) == ["a/0-1.parquet", "b"]


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
    store: LocalStore, tmp_path: Path, step: str, when: str, published: bool
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


def test_clean_temporaries_goes_by_age(store: LocalStore):
    store.put("a/b", b"")
    old, young = store.path("a").parent / ".tmp-1-x", store.path("a") / ".tmp-2-y"
    for file, age in ((old, 100), (young, 10)):
        file.write_bytes(b"")
        os.utime(file, (time.time() - age, time.time() - age))
    assert store.clean_temporaries(older_than_seconds=50) == 1
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("reported", [errno.EEXIST, errno.EIO])
def test_a_link_that_succeeded_but_was_reported_as_failed_counts_as_created(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, reported: int
):
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise OSError(reported, os.strerror(reported))

    monkeypatch.setattr(os, "link", link)
    assert store.put_new("a", b"data")
    assert store.get("a") == b"data"


def test_a_link_that_failed_is_an_error_and_publishes_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
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
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int, method: str
):
    store.put("a/other", b"")

    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match=r"cannot \w+ .*a/b: .*Free some space") as caught:
        getattr(store, method)("a/b", b"data")
    assert caught.value.disk_full
    assert _files(store.path("a")) == ["other"]


def test_lists_show_no_hidden_files(store: LocalStore):
    store.put("a/b", b"")
    (store.path("a") / ".hidden").touch()
    (store.path("a").parent / ".cache").mkdir()
    (store.path("a").parent / ".cache/c").touch()
    assert store.list() == ["a/b"]
    assert [entry.key for entry in store.entries("a/")] == ["a/b"]


def test_folders_that_deleting_leaves_empty_are_removed(store: LocalStore):
    for key in ("a/b", "a/c", "d"):
        store.put(key, b"")
    store.delete("a/b")
    assert store.path("a").is_dir()
    store.delete("a/c")
    store.delete("d")
    assert list(store.path("x").parent.iterdir()) == []


def test_a_folder_that_others_remove_while_it_is_empty_is_made_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
):
    store.put("a/b", b"")
    store.delete("a/b")
    real, num_made = Path.mkdir, []

    def mkdir(self: Path, *args: object, **options: object) -> None:
        real(self)
        num_made.append(self)
        if len(num_made) < 3:
            self.rmdir()  # another process deletes the last object in it at this moment

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert store.put_new("a/c", b"data")
    assert len(num_made) == 3
    assert store.get("a/c") == b"data"


def test_probe_accepts_a_good_directory_and_leaves_nothing(store: LocalStore):
    store.probe()
    assert _files(store.path("x").parent) == []
    assert store.list() == []


def test_probe_refuses_a_file_system_that_overwrites(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
):
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


def test_open_store_takes_paths_and_file_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    expected = tmp_path / "my run" / "x"
    for uri in ("my run", tmp_path / "my run", f"file://{tmp_path}/my%20run"):
        assert open_store(uri).path("x") == expected
    for uri in ("file://host/run", "file://", "http://x/y"):
        with pytest.raises(StoreError, match="expected a local or mounted directory"):
            open_store(uri)
    assert list(tmp_path.iterdir()) == []


def test_directories_do_not_wait_for_what_buckets_need():
    code = (
        "import sys; from pipeline.store import open_store; open_store('x').probe; "
        "sys.exit('obstore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
