"""Which unit comes next: longest checkpoints first, shared by slots, made when they are taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any

from pipeline.unit_queue import UnitQueue


@dataclass(frozen=True)
class Unit:
    subject: str
    number: int
    predicted_seconds: float = 1.0
    predicted_bytes: int = 0

    @property
    def spec(self) -> Any:
        return SimpleNamespace(subject=self.subject)


@dataclass
class Group:
    subject: str
    count: int
    seconds: float = 1.0
    bytes: int = 0
    made: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for number in range(self.count):
            self.made.append(number)
            yield Unit(self.subject, number, self.seconds, self.bytes)

    @property
    def spec(self) -> Any:
        return SimpleNamespace(subject=self.subject)

    @property
    def predicted_seconds(self) -> float:
        return self.count * self.seconds


def queue_of(*groups: Any, start: float = 0.0) -> UnitQueue:
    queue = UnitQueue()
    for group in groups:
        queue.add_group(group, start=start)
    return queue


def drained(queue: UnitQueue, subject: str = "") -> list[Any]:
    found = []
    while (unit := queue.take(subject)) is not None:
        found.append(unit)
        subject = unit.spec.subject
    return found


def test_every_unit_comes_once_and_a_slot_keeps_its_subject():
    queue = queue_of(Group("a", 3), Group("b", 2), Group("a", 1))
    assert len(queue) == 6
    units = drained(queue)
    assert [u.subject for u in units] == ["a"] * 4 + ["b"] * 2
    assert [u.number for u in units] == [0, 1, 2, 0, 0, 1]
    assert len(queue) == 0
    assert queue.take("a") is None


def test_the_subject_with_most_work_for_each_slot_comes_first():
    queue = queue_of(Group("small", 5), Group("large", 20), Group("middle", 12))
    taken = [queue.take("").spec.subject for _ in range(4)]
    # 20 for one slot; then 12 against 19 for two; then 19 for two against 11 for two, and so on.
    assert taken == ["large", "middle", "large", "large"]
    assert queue.upcoming() == ["large", "middle", "small"]


def test_a_slot_that_leaves_makes_room_on_its_subject():
    queue = queue_of(Group("a", 10), Group("b", 7))
    assert queue.take("").spec.subject == "a"
    assert queue.take("").spec.subject == "b", "7 for one slot, 9 for two"
    queue.leave("a")
    assert queue.take("").spec.subject == "a", "9 for one slot again"


def test_fetched_subjects_come_before_larger_ones():
    queue = queue_of(Group("large", 20), Group("here", 2))
    assert queue.take("", fetched=["here"]).spec.subject == "here"


def test_what_does_not_fit_is_passed_over_and_stays():
    queue = queue_of(Group("large", 5, bytes=100), Group("small", 2, bytes=1))
    assert queue.take("large", fits=lambda u: u.predicted_bytes < 10).spec.subject == "small"
    assert queue.take("", fits=lambda u: False) is None
    assert len(queue) == 6
    assert queue.take("").spec.subject == "large"


def test_units_that_were_tried_come_before_or_behind_all_others():
    queue = queue_of(Group("a", 2))
    queue.add(Unit("a", 70), last=True)
    queue.add(Unit("a", 7))
    assert [u.number for u in drained(queue)] == [7, 0, 1, 70]


def test_units_are_made_when_they_are_taken():
    group = Group("a", 1_000_000)
    queue = queue_of(group)
    for _ in range(3):
        queue.take("a")
    assert len(queue) == 999_997
    assert len(group.made) == 3


def test_launches_that_share_a_run_begin_elsewhere_and_leave_nothing_out():
    units = drained(queue_of(Group("a", 10), start=0.35))
    assert [u.number for u in units] == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


def test_a_hundred_thousand_subjects_cost_no_search_each():
    queue = queue_of(*(Group(f"s{i}", 2, seconds=1 + i % 97) for i in range(20_000)))
    entries = len(queue.heap)
    units = list(islice(drained(queue), 40_000))
    assert len(units) == 40_000
    assert len({(u.subject, u.number) for u in units}) == 40_000
    assert entries <= 20_000
    assert len(queue.heap) <= 40_000, "entries that are no longer true do not pile up"
