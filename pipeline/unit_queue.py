"""The units that wait for a slot: which one comes next.

Units of one subject (checkpoint and images) stay together, since a slot that changes its subject
loads another network. A free slot takes the subject with most work left for each slot that is on
it already, so that long checkpoints begin early and many slots share what is left of them: longest
first, by which no slot ends long after the others. Units are made when they are taken: a queue of
a million holds a few objects for each spec.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator

from pipeline.specs import Task
from pipeline.units import UnitGroup


class UnitQueue:
    """Units by subject."""

    def __init__(self) -> None:
        self.subjects: dict[str, _Subject] = {}
        self.num_units = 0
        self.slots: Counter[str] = Counter()  # slots that are on a subject
        # At least one entry of every subject, at its priority now or at a more urgent one.
        self.heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return self.num_units

    def __contains__(self, subject: object) -> bool:
        return subject in self.subjects

    def add(self, task: Task, *, last: bool = False) -> None:
        """Put a unit that was tried before all others of its subject, or behind them."""
        subject = self._subject(task.spec.subject)
        (subject.last if last else subject.first).append(task)
        self._count(task.spec.subject, 1, task.predicted_seconds)
        self._offer(task.spec.subject)

    def add_group(self, group: UnitGroup, *, start: float = 0.0) -> None:
        """Put a spec's units behind what is there; ``start`` in [0, 1) is where they begin."""
        if len(group):
            first = int(start * len(group))
            units = itertools.islice(group, first, None), itertools.islice(group, first)
            self._subject(group.spec.subject).groups.append(itertools.chain(*units))
            self._count(group.spec.subject, len(group), group.predicted_seconds)
            self._offer(group.spec.subject)

    def upcoming(self) -> list[str]:
        """Subjects that wait, most work left first."""
        return sorted(self.subjects, key=lambda s: -self.subjects[s].seconds)

    def take(
        self,
        subject: str,
        fetched: Collection[str] = (),
        fits: Callable[[Task], bool] = lambda task: True,
    ) -> Task | None:
        """The next unit for a slot that has ``subject``; None if there is none that fits.

        Args:
            subject: What the slot has loaded; empty if nothing.
            fetched: Subjects whose weights are on the slot's node or on their way to it.
            fits: Whether the slot has the memory for a unit now.
        """
        for chosen in self._order(subject, fetched):
            task = self.subjects[chosen].peek()
            if not fits(task):
                continue
            self.subjects[chosen].drop()
            if chosen != subject:
                self.slots[subject] -= 1
                self.slots[chosen] += 1
                self._offer(subject)
            self._count(chosen, -1, -task.predicted_seconds)
            return task
        return None

    def leave(self, subject: str) -> None:
        """A slot that had ``subject`` is gone or does nothing."""
        self.slots[subject] -= 1
        self._offer(subject)

    def _order(self, subject: str, fetched: Collection[str]) -> Iterator[str]:
        """Subjects in the order in which the slot would take them."""
        if subject in self.subjects:
            yield subject
        near = sorted((s for s in fetched if s in self.subjects), key=self._priority)
        yield from near
        taken, passed = {subject, *near}, list[tuple[float, str]]()
        try:
            while self.heap:
                entry = heapq.heappop(self.heap)
                other = entry[1]
                if other not in self.subjects or entry[0] > (now := self._priority(other)):
                    continue  # gone, or it has become more urgent since and says so elsewhere
                if entry[0] < now:
                    heapq.heappush(self.heap, (now, other))
                    continue
                if passed and passed[-1] == entry:
                    continue  # said twice
                passed.append(entry)
                if other not in taken:
                    yield other
        finally:
            for entry in passed:
                heapq.heappush(self.heap, entry)

    def _priority(self, subject: str) -> float:
        """Smallest first: minus the work left for each slot, this one included."""
        return -self.subjects[subject].seconds / (1 + max(0, self.slots[subject]))

    def _offer(self, subject: str) -> None:
        if subject in self.subjects:
            heapq.heappush(self.heap, (self._priority(subject), subject))

    def _subject(self, name: str) -> _Subject:
        return self.subjects.setdefault(name, _Subject())

    def _count(self, name: str, units: int, seconds: float) -> None:
        subject = self.subjects[name]
        self.num_units += units
        subject.num_units += units
        subject.seconds += seconds
        if not subject.num_units:
            del self.subjects[name]


class _Subject:
    """The units of one subject: its groups one after the other, between those tried before."""

    def __init__(self) -> None:
        self.first: deque[Task] = deque()
        self.last: deque[Task] = deque()
        self.groups: deque[Iterator[Task]] = deque()
        self.head: Task | None = None  # of the first group, made already
        self.num_units = 0
        self.seconds = 0.0

    def peek(self) -> Task:
        """The next unit; there is one."""
        if self.first:
            return self.first[0]
        while self.head is None and self.groups:
            self.head = next(self.groups[0], None)
            if self.head is None:
                self.groups.popleft()
        return self.head or self.last[0]

    def drop(self) -> None:
        """Take out what ``peek`` has just shown."""
        if self.first:
            self.first.popleft()
        elif self.head is not None:
            self.head = None
        else:
            self.last.popleft()
