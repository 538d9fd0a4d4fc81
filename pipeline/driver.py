"""The driver: plan, let the scheduler do what is to do, plan again until all is done and verified.

It holds no result. What is done is asked of the store alone, so killing it at any moment loses at
most the units in flight, and the same command continues.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

from pipeline.decisions import keep_decisions, recall_decisions
from pipeline.entries import Manifest
from pipeline.executor import Executor
from pipeline.frozen import freeze
from pipeline.known_specs import write_specs
from pipeline.launches import How, LaunchLog, LaunchRecord, new_launch_id, read_launches
from pipeline.plan import make_plan
from pipeline.prefetch import Ahead
from pipeline.resolve import resolve
from pipeline.scheduler import Launch, Observer, Scheduler
from pipeline.shards import verify
from pipeline.specs import Resolved
from pipeline.store import Store

# A new plan is made at most so often, in seconds and in times of what the last one took: chosen.
PLAN_SECONDS, PLAN_TIMES = 1.0, 5.0


def launch(
    manifest: Manifest,
    store: Store,
    open_executor: Callable[[], Executor],
    observer: Observer,
    *,
    retry_failed: bool = False,
    train_only: bool = False,
    resolved: Resolved | None = None,
    launch_id: str | None = None,
    on: str = "inline",
) -> Launch:
    """Run a manifest to the end: every planned range gets a result or a failure row.

    Plans again and again, because later work depends on earlier results: measurements on trained
    checkpoints, further draws on the error bars of the first. A slot that would be idle is reason
    enough to look what has become known, while others still work. Once nothing is left, every
    shard is verified that was not yet; a damaged one is set aside and its unit done again.

    Raises StoreError when nothing can be written any more, HubError when the hub has ceased to
    answer, and ResourceError when the slots are gone; everything committed until then stands.

    Args:
        manifest: What to audit.
        store: The run folder.
        open_executor: Opens the slots, once there is something to do.
        observer: Hears of every plan and every attempt.
        retry_failed: Try failed units again, once.
        train_only: Leave measurements alone.
        resolved: The manifest's specs, if already resolved.
        launch_id: Name of this launch's record; a new one if None.
        on: Where it runs, for the record.
    """
    started = time.monotonic()
    with (
        _Interrupts() as interrupts,
        LaunchLog(store, launch_id or new_launch_id(), on, on_request=interrupts.request) as log,
    ):
        driver = _Driver(manifest, store, observer, interrupts, log, resolved, train_only)
        try:
            driver.go(open_executor, retry_failed=retry_failed)
        finally:
            if driver.scheduler is not None:
                driver.scheduler.executor.close()
        log.update(state="interrupted" if interrupts else "done")
    driver.result.interrupted = bool(interrupts)
    driver.result.seconds = time.monotonic() - started
    return driver.result


class _Driver:
    """One launch: what it has resolved, decided, verified and done so far."""

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        observer: Observer,
        interrupts: _Interrupts,
        log: LaunchLog,
        resolved: Resolved | None,
        train_only: bool,
    ) -> None:
        self.manifest, self.store, self.observer = manifest, store, observer
        self.interrupts, self.log, self.train_only = interrupts, log, train_only
        self.result = Launch()
        self.scheduler: Scheduler | None = None
        self.resolved, self.frozen = resolved, False
        self.decisions = recall_decisions(store)
        self.recalled, self.num_kept = set(self.decisions), len(self.decisions)
        self.verified: set[str] = set()

    def go(self, open_executor: Callable[[], Executor], *, retry_failed: bool) -> None:
        """Plan and do until nothing is left, or until interrupted."""
        while not self.interrupts:
            began = time.monotonic()
            resolved = self._resolve()
            plan = make_plan(
                self.manifest, self.store, resolved=resolved, retry_failed=retry_failed,
                decisions=self.decisions,
            )  # fmt: skip
            self._keep_decisions()
            retry_failed = False  # once; what fails again in this launch stays failed
            groups = [g for g in plan.units.groups if g.spec.kind == "train" or not self.train_only]
            if not groups and not (self.scheduler and self.scheduler.remaining):
                if self._is_complete():
                    return
                continue
            self.scheduler = self.scheduler or self._scheduler(open_executor())
            if self.scheduler.add(groups, _ahead(resolved, self.manifest)):
                self.observer.planned(plan, len(self.scheduler.executor.places))
            now = time.monotonic()
            self.scheduler.run(until=now + max(PLAN_SECONDS, PLAN_TIMES * (now - began)))

    def _resolve(self) -> Resolved:
        """The manifest's specs; training makes new checkpoints known."""
        if self.resolved is None or (self.frozen and self.resolved.untrained):
            self.resolved, self.frozen = resolve(self.manifest, self.store), False
        if not self.frozen:
            freeze(self.resolved, self.manifest, self.store)
            write_specs(self.resolved.specs, self.store)
            self.frozen = True
        return self.resolved

    def _keep_decisions(self) -> None:
        if len(self.decisions) > self.num_kept:
            keep_decisions(self.decisions, self.store)
            self.num_kept = len(self.decisions)

    def _is_complete(self) -> bool:
        """Whether every shard is sound, and every decision made by this launch."""
        damaged = verify(self.store, self.verified)
        self.result.quarantined += damaged
        asked = not self.recalled
        for memo in self.recalled:
            del self.decisions[memo]
        self.recalled = set()
        return asked and not damaged

    def _scheduler(self, executor: Executor) -> Scheduler:
        self.interrupts.listen()  # Ray has put its own handler of SIGTERM in place
        return Scheduler(
            self.store, executor, self.observer, self.result, self.interrupts,
            max_attempts=self.manifest.resources.max_attempts, on_change=self._report,
            spread=_spread(self.store, self.log.record.id),
        )  # fmt: skip

    def _report(self) -> None:
        assert self.scheduler is not None
        counts = {n: v for n, v in vars(self.result).items() if n in LaunchRecord.model_fields}
        self.log.update(
            **counts,
            num_slots=len(self.scheduler.executor.places), remaining=self.scheduler.remaining,
        )  # fmt: skip


def _spread(store: Store, launch_id: str) -> random.Random | None:
    """Where units begin, if other launches work on the run: no number depends on the order."""
    others = (r for r in read_launches(store) if r.is_alive and r.id != launch_id)
    return random.Random(launch_id) if any(others) else None


def _ahead(resolved: Resolved, manifest: Manifest) -> Ahead:
    """What may be fetched ahead: the weights of checkpoints from the hub."""
    known = {file.identity: file for files in resolved.files.values() for file in files}
    files = {
        spec.subject: known[spec.ref.identity]
        for spec in resolved.specs
        if spec.ref is not None and spec.ref.identity in known
    }
    return Ahead(files, per_slot=manifest.resources.prefetch)


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

    def request(self, how: How) -> None:
        """Answer a request to stop like these signals; called from another thread."""
        if how == "now":
            self.append(signal.SIGTERM)  # a first, since two in a row may arrive as one
        os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, number: int, frame: object) -> None:
        self.append(number)
        if len(self) > 1:  # also out of a unit that runs in this process
            raise KeyboardInterrupt
