"""Reading many objects: several at once from a bucket, each given to whom asked for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.local_store import LocalStore
from pipeline.read_ahead import NUM_AHEAD, read_ahead
from pipeline.store import MissingKeyError


class Slow:
    """A bucket as far as ``get`` goes; it counts who waits for it at once."""

    def __init__(self) -> None:
        self.lock, self.active, self.peak = threading.Lock(), 0, 0
        self.asked: list[str] = []

    def get(self, key: str) -> bytes:
        with self.lock:
            self.asked.append(key)
            self.active += 1
            self.peak = max(self.peak, self.active)
        time.sleep(0.01)
        with self.lock:
            self.active -= 1
        if key.startswith("gone"):
            raise MissingKeyError(key)
        return key.encode()


def reader(store: Any, keys: list[str]) -> Any:
    return read_ahead(store, keys)


def test_objects_come_in_order_and_are_read_once_and_several_at_once():
    store, keys = Slow(), [f"k{number}" for number in range(100)]
    with reader(store, keys) as get:
        assert [get(key) for key in keys] == [key.encode() for key in keys]
    assert sorted(store.asked) == sorted(keys)
    assert 1 < store.peak <= NUM_AHEAD


def test_missing_objects_are_an_error_for_whom_asks_for_them_alone():
    store, keys = Slow(), ["a", "gone1", "b", "gone2", "c"]
    with reader(store, keys) as get:
        assert get("a") == b"a"
        with pytest.raises(MissingKeyError):
            get("gone1")
        assert get("b") == b"b"
        assert get("c") == b"c"  # nobody asked for gone2


def test_skipped_unknown_and_repeated_keys_are_read_when_asked_for():
    store, keys = Slow(), [f"k{number}" for number in range(60)]
    with reader(store, keys) as get:
        assert get("other") == b"other"
        assert get("k3") == b"k3"
        assert get("k1") == b"k1"  # behind what has been let go
        assert get("k3") == b"k3"
        assert [get(key) for key in keys[4:]] == [key.encode() for key in keys[4:]]
    assert store.asked.count("k40") == 1, "reading ahead went on after the skip"


def test_a_reader_that_stops_early_leaves_nothing_running():
    store = Slow()
    before = threading.active_count()
    with reader(store, [f"k{number}" for number in range(1000)]) as get:
        get("k0")
    assert threading.active_count() == before
    assert len(store.asked) <= NUM_AHEAD + 1


def test_directories_are_read_without_threads(tmp_path: Path):
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    with read_ahead(store, ["a"]) as get:
        assert get == store.get
