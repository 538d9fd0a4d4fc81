"""Weights of the next checkpoints arrive while slots compute, and never too many of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub
from hub_world import NAMES, WEIGHTS, point, served, write_census
from populations import Quiet

from pipeline import hub_cache, prefetch
from pipeline.executor import InlineExecutor, Place
from pipeline.hub_file import HubFile
from pipeline.prefetch import Ahead, Fetcher
from pipeline.run import Run, execute, start_run
from pipeline.specs import Task

SECONDS = 1.0  # a body takes; units are stretched to last longer


class Nodes:
    """An executor that only writes down what is to be fetched where."""

    def __init__(self, *nodes: str) -> None:
        self.places = {slot: Place(node, node) for slot, node in enumerate(nodes)}
        self.begun: list[tuple[str, str]] = []

    def prefetch(self, node: str, file: HubFile) -> None:
        self.begun.append((node, file.filename))


class Queue(str):
    """Subjects that wait, a letter each."""

    def upcoming(self) -> str:
        return self


def ahead(*subjects: str, per_slot: int) -> Ahead:
    files = {s: HubFile("r", "c" * 40, s, 1, None) for s in subjects}
    return Ahead(files, per_slot=per_slot)


def test_each_node_fetches_so_many_per_slot_and_not_one_more() -> None:
    nodes, plan = Nodes("a", "a", "b"), ahead(*"stuvwxyz", per_slot=1)
    plan.update(Queue("stuvwxyz"), ["s", "t"], nodes)
    assert sorted(node for node, _ in nodes.begun) == ["a", "a", "b"]
    assert [name for _, name in nodes.begun] == ["u", "v", "w"], "the order of the queue"
    plan.update(Queue("stuvwxyz"), ["s", "t"], nodes)
    assert len(nodes.begun) == 3, "nothing twice"
    node = dict((name, node) for node, name in nodes.begun)["u"]
    assert "u" in plan.on(node)
    plan.update(Queue("tvwxyz"), ["u", "t"], nodes)  # a slot took u: room for one more, where u was
    assert nodes.begun[3:] == [(node, "x")]


def test_what_is_not_on_the_hub_or_forbidden_is_never_fetched() -> None:
    nodes = Nodes("a")
    ahead("s", per_slot=0).update(Queue("st"), [], nodes)
    ahead(per_slot=4).update(Queue("st"), [], nodes)
    assert nodes.begun == []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with served(*NAMES) as server:
        point(server, monkeypatch, tmp_path)
        yield server


class Stretched(InlineExecutor):
    """Units in this process that last long enough for a download; notes when each ends."""

    def start(self, slot: int, task: Task) -> None:
        super().start(slot, task)
        time.sleep(1.5 * SECONDS)
        self.ends = [*getattr(self, "ends", ()), (time.time(), task.spec.checkpoint)]


def launch(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, resources: str
) -> tuple[Run, Stretched]:
    run = start_run(write_census(folder / "c.toml", *NAMES, resources=resources), str(folder / "r"))
    executor = Stretched(run.manifest.resources)
    monkeypatch.setattr("pipeline.run.InlineExecutor", lambda resources: executor)
    hub.seconds = SECONDS
    result = execute(run, Quiet(), on="inline")
    assert (result.committed, result.failed) == (3, 0)
    return run, executor


@pytest.mark.slow
def test_the_next_weights_are_on_their_way_before_a_unit_ends(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, executor = launch(hub, tmp_path, monkeypatch, "prefetch = 1")
    begun = [moment for moment, _ in hub.begun]
    ends = [moment for moment, _ in executor.ends]
    assert len(begun) == hub.bodies(WEIGHTS) == 3, "every body once, whoever asked first"
    # The first checkpoint waits for its own; the second's weights begin while it is under way,
    # the third's once the second is taken.
    assert begun[1] < ends[0]
    assert begun[2] < ends[1]
    assert hub.most_at_once() <= 2, "the unit's own and one ahead"


@pytest.mark.slow
def test_without_prefetch_every_unit_waits_for_its_own(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, executor = launch(hub, tmp_path, monkeypatch, "prefetch = 0")
    begun = [moment for moment, _ in hub.begun]
    ends = [moment for moment, _ in executor.ends]
    assert all(b > e for b, e in zip(begun[1:], ends, strict=False))
    assert hub.most_at_once() == 1


def test_a_fetcher_takes_one_at_a_time_and_stops_where_the_disk_is_full(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.hub import resolve

    files = [resolve(name) for name in NAMES]
    hub.seconds = 0.2
    fetcher = Fetcher()
    for file in files[:2]:
        fetcher.fetch(file)
    wait_until(lambda: all(hub_cache.cached(file) for file in files[:2]))
    assert hub.most_at_once() == 1
    looked: list[HubFile] = []
    monkeypatch.setattr(hub_cache, "fits", lambda files: bool(looked.extend(files)))
    fetcher.fetch(files[2])
    wait_until(lambda: looked)
    assert hub_cache.cached(files[2]) is None
    assert len(hub.begun) == 2


def test_what_a_fetcher_cannot_get_is_left_to_the_unit(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.hub import resolve

    file = resolve(NAMES[0])
    gone = HubFile("timm/gone", "c" * 40, WEIGHTS, 1, None)
    fetcher = prefetch.Fetcher()
    fetcher.fetch(gone)
    fetcher.fetch(file)
    wait_until(lambda: hub_cache.cached(file))
    assert hub_cache.cached(gone) is None


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
