"""The scheduler: plan, hand out units, retry by class of failure, plan again until all is done.

It holds no result. What is done is asked of the store alone, so killing it at any moment loses at
most the units in flight, and the same command continues.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.entries import Manifest
from pipeline.errors import HubError, StoreError
from pipeline.executor import Executor, Finished
from pipeline.frozen import freeze
from pipeline.outcome import HINTS, FailureClass, Outcome
from pipeline.plan import Decisions, Plan, make_plan
from pipeline.prefetch import Ahead
from pipeline.progress import write_specs
from pipeline.resolve import resolve
from pipeline.schema import Failure
from pipeline.specs import Resolved, Task
from pipeline.store import Store
from pipeline.unit_queue import UnitQueue
from pipeline.worker import write_failure
from tasks.block import Block

REST_SECONDS = (1.0, 60.0)  # a lost slot's first and longest pause: its node may be gone for good
MAX_LOST_SLOTS = 20  # losses of a slot or node that one unit survives: not its fault, so generous
MAX_SILENCES = 3  # units in a row that the hub did not answer, before the launch stops: chosen
BACKOFF_SECONDS = (1.0, 5.0, 20.0)  # before the 2nd, 3rd, ... attempt of a transient failure


class Observer(Protocol):
    """What a progress display hears. All methods are called from the driver's thread."""

    def planned(self, plan: Plan, num_slots: int) -> None:
        """A new round of units begins."""
        ...

    def ended(self, task: Task, outcome: Outcome | None, note: str) -> None:
        """An attempt ended; ``note`` says what happens next."""
        ...


@dataclass
class Launch:
    """What a launch did."""

    committed: int = 0
    failed: int = 0
    retried: int = 0
    lost: int = 0
    interrupted: bool = False
    nondeterminism: list[str] = field(default_factory=list)
    seconds: float = 0.0


def launch(
    manifest: Manifest,
    store: Store,
    open_executor: Callable[[], Executor],
    observer: Observer,
    *,
    retry_failed: bool = False,
    train_only: bool = False,
    resolved: Resolved | None = None,
) -> Launch:
    """Run a manifest to the end: every planned range gets a result or a failure row.

    Plans in rounds, because later work depends on earlier results: measurements on trained
    checkpoints, further draws on the error bars of the first. Raises StoreError when nothing can be
    written any more, and HubError when the hub has ceased to answer; everything committed until
    then stands.

    Args:
        manifest: What to audit.
        store: The run folder.
        open_executor: Opens the slots, once there is something to do.
        observer: Hears of every round and every attempt.
        retry_failed: Try failed units again, once.
        train_only: Leave measurements alone.
        resolved: The manifest's specs, if already resolved.
    """
    result, started = Launch(), time.monotonic()
    decisions: Decisions = {}
    executor: Executor | None = None
    with _Interrupts() as interrupts:
        try:
            while not interrupts:
                if resolved is None or resolved.untrained:  # training makes new checkpoints known
                    resolved = resolve(manifest, store)
                freeze(resolved, manifest, store)
                plan = make_plan(
                    manifest, store, resolved=resolved, retry_failed=retry_failed,
                    decisions=decisions,
                )  # fmt: skip
                write_specs(plan, store)
                retry_failed = False  # once; what fails again in this launch stays failed
                units = [u for u in plan.units if u.spec.kind == "train" or not train_only]
                if not units:
                    break
                if executor is None:
                    executor = open_executor()
                    interrupts.listen()  # Ray has put its own handler of SIGTERM in place
                observer.planned(plan, executor.num_slots)
                ahead = _ahead(resolved, manifest)
                _Round(manifest, store, executor, observer, result, interrupts, ahead).run(units)
        finally:
            if executor is not None:
                executor.close(now=bool(interrupts))
    result.interrupted = bool(interrupts)
    result.seconds = time.monotonic() - started
    return result


def _ahead(resolved: Resolved, manifest: Manifest) -> Ahead:
    """What may be fetched ahead: the weights of checkpoints from the hub."""
    known = {file.identity: file for files in resolved.files.values() for file in files}
    files = {
        spec.subject: known[spec.ref.identity]
        for spec in resolved.specs
        if spec.ref is not None and spec.ref.identity in known
    }
    return Ahead(files, per_slot=manifest.resources.prefetch)


class _Round:
    """One round: a fixed set of units, each ending committed or failed."""

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        executor: Executor,
        observer: Observer,
        result: Launch,
        interrupts: list[int],
        ahead: Ahead,
    ) -> None:
        self.max_attempts = manifest.resources.max_attempts
        self.store, self.executor, self.observer = store, executor, observer
        self.result, self.interrupts, self.ahead = result, interrupts, ahead
        self.queue = UnitQueue()
        self.delayed: list[tuple[float, Task]] = []
        self.subjects = [""] * executor.num_slots
        self.idle = set(range(executor.num_slots))
        self.losses: Counter[int] = Counter()  # of each slot, since it last gave an outcome
        self.rests_until: dict[int, float] = {}
        self.lost: Counter[tuple[str, Block]] = Counter()
        self.silent: list[str] = []  # subjects that the hub did not answer for, since a commit
        self.num_subjects = 0

    def run(self, units: list[Task]) -> None:
        self.num_subjects = len({unit.spec.subject for unit in units})
        for unit in units:
            self.queue.add(unit)
        while True:
            self._release_delayed()
            if not self.interrupts:
                self._start_units()
            busy = len(self.idle) < self.executor.num_slots
            if not busy and (self.interrupts or not (self.queue or self.delayed)):
                return
            for finished in self.executor.wait(timeout=0.5):
                self._settle(finished)
            if not busy:
                time.sleep(0.1)  # only delayed units are left

    def _start_units(self) -> None:
        now = time.monotonic()
        for slot in sorted(s for s in self.idle if self.rests_until.get(s, 0.0) <= now):
            here = self.ahead.on(self.executor.nodes[slot])
            task = self.queue.take(self.subjects[slot], here)
            if task is None:
                return
            self.idle.remove(slot)
            self.subjects[slot] = task.spec.subject
            self.ahead.update(self.queue.upcoming(), self.subjects, self.executor)
            self.executor.start(slot, task)

    def _release_delayed(self) -> None:
        now = time.monotonic()
        for item in [d for d in self.delayed if d[0] <= now]:
            self.delayed.remove(item)
            self.queue.add(item[1])

    def _settle(self, finished: Finished) -> None:
        """Decide what an ended attempt means. The one place where retries are granted."""
        task, outcome = finished.task, finished.outcome
        self.idle.add(finished.slot)
        self._rest(finished.slot, lost=outcome is None)
        note = ""
        if outcome is None:
            note = self._lost(task)
        elif outcome.status != "failed":
            self.result.committed += 1
            self.silent.clear()
            if outcome.nondeterminism:
                self.result.nondeterminism.append(outcome.nondeterminism)
        else:
            assert outcome.failure is not None
            assert outcome.failure_class is not None
            note = self._failed(task, outcome.failure, outcome.failure_class)
        self.observer.ended(task, outcome, note)

    def _rest(self, slot: int, *, lost: bool) -> None:
        """Let a lost slot pause, longer each time, so that it does not eat the others' units."""
        if not lost:
            self.losses.pop(slot, None)
            return
        self.losses[slot] += 1
        first, longest = REST_SECONDS
        pause = min(longest, first * 2.0 ** (self.losses[slot] - 1))
        self.rests_until[slot] = time.monotonic() + pause

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
        if kind == "store":
            full = "No space left" in failure.message or "disk" in failure.message.lower()
            raise StoreError(failure.message, disk_full=full)
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
        self.result.retried += 1
        if kind == "memory":
            if task.batch_size == 1:
                return self._give_up(task, failure)
            self.queue.add(task.again(batch_size=max(1, task.batch_size // 2)))
            return f"out of memory; again with batch size {max(1, task.batch_size // 2)}"
        if kind in ("transient", "unreachable"):
            wait = BACKOFF_SECONDS[min(task.attempt, len(BACKOFF_SECONDS)) - 1]
            self.delayed.append((time.monotonic() + wait, task.again()))
            return f"{failure.type}; again in {wait:g} s"
        self.queue.add(task.again())
        return f"{failure.message}; again"

    def _give_up(self, task: Task, failure: Failure) -> str:
        self.result.failed += 1
        write_failure(self.store, task, failure)
        return f"failed: {failure.message}"


class _Interrupts(list[int]):
    """Signals received: the first ends the handing out of units, the second stops at once."""

    def __enter__(self) -> _Interrupts:
        self.before = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
        }
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Answer the signals from here."""
        for number in self.before:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.append(number)
        if len(self) > 1:  # also out of a unit that runs in this process
            raise KeyboardInterrupt
