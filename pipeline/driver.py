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
from pipeline.launches import How, LaunchLog, new_launch_id, read_launches
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
    result, started = Launch(), time.monotonic()
    frozen: Resolved | None = None
    decisions = recall_decisions(store)
    recalled, num_kept = set(decisions), len(decisions)
    verified: set[str] = set()
    executor: Executor | None = None
    scheduler: Scheduler | None = None
    with (
        _Interrupts() as interrupts,
        LaunchLog(store, launch_id or new_launch_id(), on, on_request=interrupts.request) as log,
    ):

        def report() -> None:
            assert executor is not None
            assert scheduler is not None
            log.update(
                **{name: getattr(result, name) for name in _COUNTS},
                num_slots=len(executor.places), remaining=scheduler.remaining,
            )  # fmt: skip

        try:
            while not interrupts:
                planning = time.monotonic()
                if resolved is None or resolved.untrained:  # training makes new checkpoints known
                    resolved = resolve(manifest, store)
                if resolved is not frozen:
                    freeze(resolved, manifest, store)
                    write_specs(resolved.specs, store)
                    frozen = resolved
                plan = make_plan(
                    manifest, store, resolved=resolved, retry_failed=retry_failed,
                    decisions=decisions,
                )  # fmt: skip
                if len(decisions) > num_kept:
                    keep_decisions(decisions, store)
                    num_kept = len(decisions)
                retry_failed = False  # once; what fails again in this launch stays failed
                groups = [g for g in plan.units.groups if g.spec.kind == "train" or not train_only]
                if not groups and not (scheduler and scheduler.remaining):
                    damaged = verify(store, verified)
                    result.quarantined += damaged
                    asked_anew = not recalled
                    for memo in recalled:
                        del decisions[memo]
                    recalled = set()
                    if damaged or not asked_anew:
                        continue
                    break
                if executor is None:
                    executor = open_executor()
                    interrupts.listen()  # Ray has put its own handler of SIGTERM in place
                if scheduler is None:
                    scheduler = Scheduler(
                        store, executor, observer, result, interrupts,
                        max_attempts=manifest.resources.max_attempts, on_change=report,
                        spread=_spread(store, log.record.id),
                    )  # fmt: skip
                if scheduler.add(groups, _ahead(resolved, manifest)):
                    observer.planned(plan, len(executor.places))
                took = time.monotonic() - planning
                scheduler.run(until=time.monotonic() + max(PLAN_SECONDS, PLAN_TIMES * took))
        finally:
            if executor is not None:
                executor.close()
        log.update(state="interrupted" if interrupts else "done")
    result.interrupted = bool(interrupts)
    result.seconds = time.monotonic() - started
    return result


_COUNTS = ("committed", "failed", "retried", "lost", "duplicates", "speculated")


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
