"""What the scheduler does with slots that differ: memory, slow nodes, slots that come and go."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from populations import Quiet, save_mlp, write_manifest

from pipeline.driver import launch
from pipeline.executor import Finished, InlineExecutor, Place
from pipeline.launches import LaunchRecord, read_launches, request_stop, write_launch
from pipeline.outcome import Outcome
from pipeline.plan import make_plan
from pipeline.prefetch import Ahead
from pipeline.run import Run, start_run
from pipeline.scheduler import Launch, Scheduler
from pipeline.specs import Task
from pipeline.units import UnitGroup
from pipeline.worker import Workbench, run_unit

GIB = 2**30
MEASUREMENTS = """
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 16
min_draws = 2
target_relative_stderr = 0.2
"""


class Slots:
    """Slots in several places. Units end when the test says so; by default the oldest, at once."""

    def __init__(self, *places: Place) -> None:
        self.places = dict(enumerate(places))
        self.running: dict[int, Task] = {}
        self.started: list[tuple[int, Task]] = []
        self.stuck: set[int] = set()

    def prefetch(self, node: str, file: object) -> None:
        raise AssertionError("nothing here is on the hub")

    def start(self, slot: int, task: Task) -> None:
        assert slot not in self.running, "a busy slot got a second unit"
        self.running[slot] = task
        self.started.append((slot, task))

    def wait(self, timeout: float) -> list[Finished]:
        for slot in self.running:
            if slot not in self.stuck:
                task = self.running.pop(slot)
                return [Finished(slot, task, self.done(task))]
        time.sleep(min(timeout, 0.01))
        return []

    def done(self, task: Task) -> Outcome | None:
        return Outcome("committed", 0.1)

    def close(self) -> None:
        self.running.clear()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    for seed in range(2):
        save_mlp(tmp_path / f"checkpoints/mlp{seed}", seed=seed)
    manifest = write_manifest(
        tmp_path / "m.toml", samples=64, measurements=MEASUREMENTS,
        resources="unit_seconds = 0.001\nbatch_size = 16",
    )  # fmt: skip
    return start_run(manifest, str(tmp_path / "run"))


@pytest.fixture
def groups(run: Run) -> tuple[UnitGroup, ...]:
    return make_plan(run.manifest, run.store).units.groups


def scheduler(run: Run, slots: Slots) -> Scheduler:
    return Scheduler(run.store, slots, Quiet(), Launch(), [], max_attempts=3)


def add(it: Scheduler, groups: Sequence[UnitGroup]) -> int:
    return it.add(groups, Ahead({}, per_slot=0))


def test_units_that_need_much_memory_do_not_run_beside_each_other(run: Run, groups):
    large = [replace(group, predicted_bytes=6 * GIB) for group in groups]
    slots = Slots(Place("a", "a", 10 * GIB), Place("a", "a", 10 * GIB), Place("b", "b", 10 * GIB))
    most: dict[str, int] = {"a": 0, "b": 0}

    class Counting(Slots):
        def start(self, slot: int, task: Task) -> None:
            super().start(slot, task)
            here = [s for s in self.running if self.places[s].node == self.places[slot].node]
            most[self.places[slot].node] = max(most[self.places[slot].node], len(here))

    counting = Counting(*slots.places.values())
    it = scheduler(run, counting)
    number = add(it, large)
    it.run(until=0.0)
    assert most == {"a": 1, "b": 1}
    assert len(counting.started) == number


def test_small_units_fill_the_memory_that_a_large_one_leaves(run: Run, groups):
    """The large checkpoint comes first; its second unit waits while small ones run beside it."""
    first, *_ = groups
    sized = [
        replace(g, predicted_bytes=(6 if g.spec.subject == first.spec.subject else 2) * GIB)
        for g in groups
    ]
    slots = Slots(*[Place("a", "a", 10 * GIB)] * 2)
    slots.stuck = {0, 1}
    it = scheduler(run, slots)
    add(it, sized)
    it._start_units()
    assert sorted((t.predicted_bytes or 0) // GIB for t in slots.running.values()) == [2, 6]


def test_a_unit_larger_than_all_memory_runs_alone(run: Run, groups):
    slots = Slots(*[Place("a", "a", GIB)] * 2)
    it = scheduler(run, slots)
    number = add(it, [replace(group, predicted_bytes=5 * GIB) for group in groups])
    it.run(until=0.0)
    assert len(slots.started) == number


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.scheduler.SLOW_SECONDS", 0.05)
    monkeypatch.setattr("pipeline.scheduler.SLOW_FACTOR", 1.0)


@pytest.mark.usefixtures("impatient")
def test_a_slow_nodes_last_unit_is_given_to_another_node_and_is_not_waited_for(run: Run, groups):
    slots = Slots(Place("fast", "fast"), Place("slow", "slow"))
    slots.stuck = {1}
    it = scheduler(run, slots)
    number = add(it, groups)
    it.run(until=math.inf)
    slow = next(task for slot, task in slots.started if slot == 1)
    assert [slot for slot, task in slots.started if task == slow] == [1, 0]
    assert (it.result.speculated, it.result.committed, it.remaining) == (1, number, 0)
    # The slow node's unit still runs; its end changes nothing.
    slots.stuck.clear()
    slots.done = lambda task: Outcome("duplicate", 9.0)  # type: ignore[method-assign]
    it._settle(slots.wait(0.0)[0])
    assert (it.result.duplicates, it.result.committed, it.remaining) == (1, number, 0)


@pytest.mark.usefixtures("impatient")
def test_of_two_attempts_one_may_fail(run: Run, groups):
    slots = Slots(Place("fast", "fast"), Place("slow", "slow"))
    slots.stuck = {1}
    outcomes: list[Outcome | None] = []

    def done(task: Task) -> Outcome | None:
        if it.result.speculated and not outcomes:
            outcomes.append(None)  # the copy's node dies
            slots.stuck.clear()
            return None
        return Outcome("committed", 0.1)

    slots.done = done  # type: ignore[method-assign]
    it = scheduler(run, slots)
    number = add(it, groups)
    it.run(until=math.inf)
    assert outcomes == [None]
    assert (it.result.committed, it.result.lost, it.result.failed) == (number, 0, 0)


@pytest.mark.usefixtures("impatient")
def test_slots_of_one_node_do_not_repeat_each_others_units(run: Run, groups):
    slots = Slots(Place("a", "a"), Place("a", "a"))
    slots.stuck = {1}
    it = scheduler(run, slots)
    add(it, groups)
    threading.Timer(0.5, slots.stuck.clear).start()
    it.run(until=math.inf)
    assert it.result.speculated == 0


def test_slots_may_join_while_units_run(run: Run, groups):
    slots = Slots(Place("a", "a"))
    it = scheduler(run, slots)
    number = add(it, groups)
    it.on_change = lambda: slots.places.setdefault(1, Place("b", "b"))
    it.run(until=0.0)
    assert {slot for slot, _ in slots.started} == {0, 1}
    assert len(slots.started) == number


class Really(Slots):
    """Slots that measure; slot 1 holds its first unit back until nothing else has come for 3 s."""

    def __init__(self) -> None:
        super().__init__(Place("a", "a"), Place("b", "b"))
        self.bench = Workbench()
        self.stuck = {1}
        self.finished: list[Task] = []
        self.worked_at = time.monotonic()

    def wait(self, timeout: float) -> list[Finished]:
        if time.monotonic() - self.worked_at > 3.0:
            self.stuck.clear()
        return super().wait(timeout)

    def done(self, task: Task) -> Outcome | None:
        outcome = run_unit(task, self.bench)
        self.finished.append(task)
        self.worked_at = time.monotonic()
        return outcome


def test_a_slow_unit_does_not_keep_other_checkpoints_from_their_next_stage(run: Run):
    """Sequential stopping asks for more draws of one network before the other's are all there."""
    slots = Really()
    result = launch(run.manifest, run.store, lambda: slots, Quiet())
    assert result.failed == 0
    assert not make_plan(run.manifest, run.store).units
    held = next(task for slot, task in slots.started if slot == 1)
    before = slots.finished[: slots.finished.index(held)]
    assert any(task.block.draws.start >= 2 for task in before), "nobody went on meanwhile"


def test_a_request_to_stop_ends_a_launch_between_two_units(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.launches.BEAT_SECONDS", 0.05)

    class Asking(InlineExecutor):
        def start(self, slot: int, task: Task) -> None:
            super().start(slot, task)
            (record,) = read_launches(run.store)
            request_stop(run.store, record.id, "drain")
            time.sleep(0.2)

    result = launch(
        run.manifest, run.store, lambda: Asking(run.manifest.resources), Quiet(), on="here"
    )
    assert result.interrupted
    assert result.committed == 1
    (record,) = read_launches(run.store)
    assert (record.state, record.committed, record.on) == ("interrupted", 1, "here")
    assert record.remaining > 0


def test_a_request_to_stop_at_once_abandons_what_runs(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.launches.BEAT_SECONDS", 0.05)

    class Asking(Slots):
        def start(self, slot: int, task: Task) -> None:
            super().start(slot, task)
            self.stuck = {0}
            (record,) = read_launches(run.store)
            request_stop(run.store, record.id, "now")

    with pytest.raises(KeyboardInterrupt):
        launch(run.manifest, run.store, lambda: Asking(Place("a", "a")), Quiet())
    (record,) = read_launches(run.store)
    assert (record.state, record.message) == ("interrupted", "stopped at once")


def test_a_launch_that_fails_says_so_in_its_record(run: Run):
    def refuse() -> InlineExecutor:
        raise RuntimeError("no slots today")

    with pytest.raises(RuntimeError):
        launch(run.manifest, run.store, refuse, Quiet())
    (record,) = read_launches(run.store)
    assert (record.state, record.message) == ("failed", "no slots today")


@pytest.fixture
def two_launches(run: Run) -> list[Launch]:
    results: list[Launch] = []

    def work() -> None:
        # Not by ``launch``: signals are the main thread's.
        executor = InlineExecutor(run.manifest.resources)
        it = Scheduler(run.store, executor, Quiet(), Launch(), [], max_attempts=3)
        add(it, make_plan(run.manifest, run.store).units.groups)
        it.run(until=math.inf)
        results.append(it.result)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_launches_at_once_commit_every_unit_once(run: Run, two_launches: list[Launch]):
    units = sum(result.committed for result in two_launches)
    attempts = units + sum(result.duplicates for result in two_launches)
    assert not [line for result in two_launches for line in result.nondeterminism]
    assert units == len(list((Path(run.store.uri) / "shards").rglob("*.parquet")))
    assert attempts == 2 * units


def test_a_launch_beside_another_begins_in_the_middle(run: Run):
    other = LaunchRecord(
        id="other", on="inline", host="h", pid=1, started_at="2020-01-01T00:00:00+00:00",
        heartbeat_at="2100-01-01T00:00:00+00:00",
    )  # fmt: skip
    write_launch(run.store, other)
    slots = Really()
    slots.stuck.clear()
    result = launch(run.manifest, run.store, lambda: slots, Quiet())
    assert result.failed == 0
    first = {task.spec.key: task.block for _, task in reversed(slots.started)}
    assert any(block.samples.start > 0 for block in first.values())
    assert not make_plan(run.manifest, run.store).units


def test_a_unit_is_done_again_while_a_slow_slot_still_has_it(run: Run, groups):
    slots = Slots(Place("a", "a"), Place("b", "b"))
    it = scheduler(run, slots)
    task = next(iter(groups[0]))
    add(it, [])
    # Slot 0 is stuck with a unit that slot 1 has committed, and whose shard was damaged since.
    it.queue.add(task)
    it._start_units()
    (slot,) = it.running
    slots.stuck.add(slot)
    it.doubled.add((task.spec.key, task.block))
    it.over.add(slot)
    number = add(it, groups[:1])
    assert number == len(groups[0])
    it.run(until=0.0)
    assert it.result.committed == number
