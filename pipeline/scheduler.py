"""Which slot does which unit next, and what an attempt's end means: all retries are granted here.

A unit is free to be tried again as often as its slot or node is lost; what it does itself it may do
``max_attempts`` times. Nothing is kept but the units in flight: what is done is in the store.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.coverage import without
from pipeline.errors import HubError, StoreError
from pipeline.executor import Executor, Finished, Place
from pipeline.outcome import HINTS, FailureClass, Outcome
from pipeline.plan import Plan
from pipeline.prefetch import Ahead
from pipeline.schema import Failure
from pipeline.shards import Quarantined
from pipeline.specs import Task
from pipeline.store import Store
from pipeline.unit_queue import UnitQueue
from pipeline.units import UnitGroup
from pipeline.worker import write_failure
from tasks.block import Block

REST_SECONDS = (1.0, 60.0)  # a slot that loses its units: first and longest pause
MAX_LOST_SLOTS = 20  # losses of a slot or node that one unit survives: not its fault, so generous
MAX_SILENCES = 3  # units in a row that the hub did not answer, before the launch stops: chosen
BACKOFF_SECONDS = (1.0, 5.0, 20.0)  # before the 2nd, 3rd, ... attempt of a transient failure
MEMORY_SHARE = 0.9  # of a pool, for the units that run in it together: predictions are not exact
# A unit is given to a second slot where it takes so many times longer than others and is late by
# so much: chosen, as in MapReduce's backup tasks.
SLOW_FACTOR, SLOW_SECONDS = 3.0, 30.0
NUM_PACES = 50  # units that say how long a predicted second is here and now


@dataclass
class Launch:
    """What a launch did."""

    committed: int = 0
    failed: int = 0
    retried: int = 0
    lost: int = 0
    duplicates: int = 0
    speculated: int = 0
    interrupted: bool = False
    nondeterminism: list[str] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    seconds: float = 0.0


class Observer(Protocol):
    """What a progress display hears. All methods are called from the scheduler's thread."""

    def planned(self, plan: Plan, num_slots: int) -> None:
        """There is a new plan: its units are all that is to do now, running ones included."""
        ...

    def ended(self, task: Task, outcome: Outcome | None, note: str) -> None:
        """An attempt ended; ``note`` says what happens next."""
        ...


@dataclass(frozen=True)
class _Attempt:
    """A unit on a slot."""

    task: Task
    place: Place
    started: float

    @property
    def unit(self) -> tuple[str, Block]:
        return self.task.spec.key, self.task.block


class Scheduler:
    """Units in flight: those that wait, those that run, those that will be tried again.

    With ``spread`` each spec's units begin somewhere in their middle: launches that share a run
    then rarely do the same ones.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        observer: Observer,
        result: Launch,
        interrupts: Sequence[int],
        *,
        max_attempts: int,
        spread: random.Random | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.executor, self.observer = store, executor, observer
        self.result, self.interrupts, self.max_attempts = result, interrupts, max_attempts
        self.spread, self.on_change = spread, on_change
        self.ahead = Ahead({}, per_slot=0)
        self.queue = UnitQueue()
        self.delayed: list[tuple[float, Task]] = []
        self.running: dict[int, _Attempt] = {}
        self.subjects: dict[int, str] = {}
        self.losses: Counter[int] = Counter()  # of each slot, since it last gave an outcome
        self.rests_until: dict[int, float] = {}
        self.lost: Counter[tuple[str, Block]] = Counter()
        self.doubled: set[tuple[str, Block]] = set()  # units that were given to two slots
        self.over: set[int] = set()  # slots whose unit another slot has done meanwhile
        self.paces: deque[float] = deque(maxlen=NUM_PACES)  # seconds per predicted second
        self.silent: list[str] = []  # subjects that the hub did not answer for, since a commit
        self.num_subjects = 0

    @property
    def remaining(self) -> int:
        """Units known to be to do, those that run included."""
        return len(self.queue) + len(self.delayed) + self._num_running

    def add(self, groups: Iterable[UnitGroup], ahead: Ahead) -> int:
        """Take units in, except those in flight. Returns how many."""
        before = self.remaining
        self.ahead = ahead
        in_flight: dict[str, list[Block]] = {}
        for task in self._in_flight():
            in_flight.setdefault(task.spec.key, []).append(task.block)
        subjects = set(self.subjects.values())
        for group in groups:
            subjects.add(group.spec.subject)
            known = in_flight.get(group.spec.key)
            if known:
                group = replace(group, gaps=tuple(without(group.gaps, known)))
            self.queue.add_group(group, start=self.spread.random() if self.spread else 0.0)
        self.num_subjects = len(subjects)
        return self.remaining - before

    def run(self, until: float) -> None:
        """Do units until all have ended, or until the queue is empty while a slot could do more.

        Interrupted, nothing new begins. A slot whose unit another has done meanwhile is not waited
        for.

        Args:
            until: The time (of ``time.monotonic``) before which only the former counts.

        Raises:
            StoreError: Nothing can be written any more.
            HubError: The hub has ceased to answer.
        """
        settled = 0
        while True:
            self._release_delayed()
            if not self.interrupts:
                self._start_units()
            if not self._num_running and (self.interrupts or not (self.queue or self.delayed)):
                return
            waits = self.interrupts or self.queue or self.delayed or self._all_busy()
            if settled and not waits and time.monotonic() >= until:
                return  # what has ended may have made more work known
            finished = self.executor.wait(timeout=0.5)
            for item in finished:
                self._settle(item)
            settled += len(finished)
            self.on_change()
            if not self.running and not finished:
                time.sleep(0.1)  # only delayed units are left, or no slot is up

    @property
    def _num_running(self) -> int:
        return len(self.running) - len(self.over)

    def _in_flight(self) -> list[Task]:
        # Not what another slot has done meanwhile: nobody waits for it, should it be to do again.
        running = [a.task for slot, a in self.running.items() if slot not in self.over]
        return running + [task for _, task in self.delayed]

    def _all_busy(self) -> bool:
        return self.executor.places.keys() <= self.running.keys()

    def _start_units(self) -> None:
        now, places = time.monotonic(), self.executor.places
        idle = sorted(
            s for s in places if s not in self.running and self.rests_until.get(s, 0.0) <= now
        )
        if not idle:
            return
        used: Counter[str] = Counter()
        for attempt in self.running.values():
            used[attempt.place.pool] += attempt.task.predicted_bytes or 0
        late = self._late(now)
        for slot in idle:
            task = self._next(slot, places[slot], used) or self._slow_one(places[slot], late)
            if task is None:
                continue
            used[places[slot].pool] += task.predicted_bytes or 0
            self.subjects[slot] = task.spec.subject
            self.running[slot] = _Attempt(task, places[slot], now)
            self.ahead.update(self.queue, set(self.subjects.values()), self.executor)
            self.executor.start(slot, task)

    def _next(self, slot: int, place: Place, used: Counter[str]) -> Task | None:
        """The queue's next unit that the slot's memory has room for now."""

        def fits(task: Task) -> bool:
            if place.pool_bytes is None or not used[place.pool]:
                return True  # alone it may try: predictions are not exact
            needed = used[place.pool] + (task.predicted_bytes or 0)
            return needed <= MEMORY_SHARE * place.pool_bytes

        before = self.subjects.get(slot, "")
        return self.queue.take(before, self.ahead.on(place.node), fits)

    def _late(self, now: float) -> list[_Attempt]:
        """Units that take far too long, latest first; looked for once nothing else waits."""
        if self.queue or self.delayed or len(self.paces) < 3:
            return []
        pace = statistics.median(self.paces)
        late = [
            (now - a.started - SLOW_FACTOR * pace * a.task.predicted_seconds, slot)
            for slot, a in self.running.items()
        ]
        return [self.running[s] for t, s in sorted(late, reverse=True) if t >= SLOW_SECONDS]

    def _slow_one(self, place: Place, late: Iterable[_Attempt]) -> Task | None:
        """A late unit of another node that nobody else has been given yet."""
        for attempt in late:
            if attempt.place.node != place.node and attempt.unit not in self.doubled:
                self.doubled.add(attempt.unit)
                self.result.speculated += 1
                self.observer.ended(attempt.task, None, "slow; also given to another slot")
                return attempt.task
        return None

    def _release_delayed(self) -> None:
        now = time.monotonic()
        for item in [d for d in self.delayed if d[0] <= now]:
            self.delayed.remove(item)
            self.queue.add(item[1])

    def _settle(self, finished: Finished) -> None:
        """Decide what an ended attempt means."""
        task, outcome = finished.task, finished.outcome
        attempt = self.running.pop(finished.slot)
        self._rest(finished.slot, lost=outcome is None)
        others = [
            slot
            for slot, other in self.running.items()
            if attempt.unit in self.doubled and slot not in self.over and other.unit == attempt.unit
        ]
        is_done = outcome is not None and outcome.status != "failed"
        note = ""
        if finished.slot in self.over:
            self.over.discard(finished.slot)
            self.result.duplicates += is_done
            return
        if others and not is_done:
            self.doubled.discard(attempt.unit)
            self.observer.ended(task, None, "one of two attempts ended without a result")
            return
        self.over.update(others)
        if outcome is None:
            note = self._lost(task)
        elif outcome.status != "failed":
            self._done(attempt, outcome)
        else:
            assert outcome.failure is not None
            assert outcome.failure_class is not None
            if outcome.failure_class == "store":
                raise StoreError(outcome.failure.message, disk_full=outcome.disk_full)
            note = self._failed(task, outcome.failure, outcome.failure_class)
        self.observer.ended(task, outcome, note)

    def _done(self, attempt: _Attempt, outcome: Outcome) -> None:
        self.silent.clear()
        if outcome.status == "duplicate":
            self.result.duplicates += 1
        else:
            self.result.committed += 1
            if attempt.task.predicted_seconds > 0:
                seconds = time.monotonic() - attempt.started
                self.paces.append(seconds / attempt.task.predicted_seconds)
        if outcome.nondeterminism:
            self.result.nondeterminism.append(outcome.nondeterminism)

    def _rest(self, slot: int, *, lost: bool) -> None:
        """Let a lost slot pause, longer each time, so that it does not eat the others' units."""
        if not lost:
            self.losses.pop(slot, None)
            return
        self.losses[slot] += 1
        first, longest = REST_SECONDS
        pause = min(longest, first * 2.0 ** (self.losses[slot] - 1))
        self.rests_until[slot] = time.monotonic() + pause
        self.queue.leave(self.subjects.pop(slot))

    def _lost(self, task: Task) -> str:
        self.result.lost += 1
        self.lost[task.spec.key, task.block] += 1
        if self.lost[task.spec.key, task.block] > MAX_LOST_SLOTS:
            message = f"its slot or node was lost {MAX_LOST_SLOTS + 1} times"
            failure = Failure(
                class_="crash", type="SlotLost", message=message, hint=HINTS["crash"], traceback=""
            )
            return self._give_up(task, failure)
        self.queue.add(task)  # free of charge: the slot died, not the unit
        return "slot lost; unit requeued"

    def _failed(self, task: Task, failure: Failure, kind: FailureClass) -> str:
        if kind == "unreachable":
            self.silent.append(task.spec.subject)
            # Each has waited, and the rest would only wait too; one alone may be at fault itself.
            several = len(set(self.silent)) >= min(2, self.num_subjects)
            if len(self.silent) >= MAX_SILENCES and several:
                raise HubError(failure.message, unasked=True)
        halves = task.halves() if kind == "crash" and task.attempt == 2 else []
        if halves:  # what kills its process shall cost half a unit, not all of it
            for half in halves:
                self.queue.add(half)
            return f"{failure.message} twice; again in two halves"
        # On a GPU an error may be an earlier unit's: the next attempt gets a fresh process.
        certain = kind == "unexpected" and (task.device == "cpu" or task.attempt > 1)
        if kind == "permanent" or certain or task.attempt >= self.max_attempts:
            return self._give_up(task, failure)
        if kind == "memory" and task.batch_size == 1:
            return self._give_up(task, failure)
        self.result.retried += 1
        if kind == "memory":
            self.queue.add(task.again(batch_size=max(1, task.batch_size // 2)))
            return f"out of memory; again with batch size {max(1, task.batch_size // 2)}"
        if kind in ("transient", "unreachable"):
            wait = BACKOFF_SECONDS[min(task.attempt, len(BACKOFF_SECONDS)) - 1]
            self.delayed.append((time.monotonic() + wait, task.again()))
            return f"{failure.type}; again in {wait:g} s"
        # Not at once: what killed it may be the machine's trouble of this moment.
        self.queue.add(task.again(), last=True)
        return f"{failure.message}; again"

    def _give_up(self, task: Task, failure: Failure) -> str:
        self.result.failed += 1
        write_failure(self.store, task, failure)
        return f"failed: {failure.message}"
