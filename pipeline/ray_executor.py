"""Slots as Ray actors, on this machine or on a cluster.

Ray starts processes and carries small messages; what is done, and what is tried again, is not its
business. Its retries are off, because they hide crashes and repeat out-of-memory without end. It
restarts actors, elsewhere if their node is gone, and such a slot gets no unit before it has
answered. A slot that does not answer for ``SILENT_SECONDS`` counts as lost, whatever Ray thinks:
after a pulled cable its client keeps waiting for minutes.

Nodes may join: their slots are added. Nothing here blocks: answers arrive by callback in a queue,
so that a thousand slots cost the scheduler what ten do.
"""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.entries import ResourceSpec
from pipeline.errors import ResourceError
from pipeline.executor import Finished, Place
from pipeline.hub_file import HubFile
from pipeline.prefetch import Fetcher
from pipeline.ray_cluster import alive_nodes, connect, fitting, knock, slots_that_fit
from pipeline.versions import versions

if TYPE_CHECKING:
    from pipeline.slot import Hello
    from pipeline.specs import Task

START_SECONDS = 120.0  # slots of which none is up by then never will be: chosen
TOGETHER_SECONDS = 2.0  # how long the first slot waits for the others: chosen
PING_SECONDS, SILENT_SECONDS = 5.0, 25.0  # together below a cable's 45 s
AGAIN_SECONDS = (0.5, 10.0)  # first and longest pause before a lost slot is asked again
LOOK_SECONDS = 5.0  # between two looks at the cluster's nodes
HEAD_SECONDS = 40.0  # without an answer of the head; Ray would end this process after 60
EMPTY_SECONDS = (60.0, 600.0)  # without any slot: when to say so, and when to give up; chosen
_log = logging.getLogger(__name__)


class _Event(NamedTuple):
    """An answer that arrived: of ``call`` to a slot, or the cluster's ``nodes``."""

    kind: str
    slot: int
    call: int
    answer: Any


@dataclass
class _Slot:
    """An actor and what is known of it. ``place`` is None until it has answered."""

    actor: Any
    place: Place | None = None
    task: Task | None = None
    calls: dict[str, int] = field(default_factory=dict)  # number of the latest call of each kind
    pinged_at: float = 0.0
    answered_at: float = 0.0
    asked_at: float = 0.0
    ask_at: float | None = None  # when to say hello again
    losses: int = 0  # since it last did a unit


class RayExecutor:
    """One actor per slot; each runs its units in a child process (pipeline/slot.py).

    Args:
        resources: What a slot takes.
        address: A cluster's; None starts Ray on this machine alone.
        check: Called on the connected cluster, before any slot is started.

    Raises:
        ResourceError: No cluster there, no slot fits, none comes up, or all have other versions.
    """

    def __init__(
        self,
        resources: ResourceSpec,
        *,
        address: str | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        import ray
        import ray.exceptions

        self.ray: Any = ray
        self.resources, self.address = resources, address
        self.owns_cluster = not ray.is_initialized()
        self.slots: dict[int, _Slot] = {}
        self.events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self.num_calls = 0
        self.fetchers: dict[str, Any] = {}
        self.refused = ""  # why a slot was left out
        self.trouble = ""  # why a slot did not come up
        self.closing = threading.Event()
        self.listened_at = self.head_answered_at = self.had_slots_at = time.monotonic()
        self.has_told = False
        if self.owns_cluster:
            connect(address)
        self.head = address or ""
        if not self.head.startswith("ray://"):
            self.head = ray.get_runtime_context().gcs_address
        try:
            if check is not None:
                check()
            self.remote = self._actor_class()
            self._add_slots(
                slots_that_fit(alive_nodes(ray), resources, where=address or "this machine")
            )
            threading.Thread(target=self._look, daemon=True).start()
            self._await_first()
        except BaseException:
            self.close()  # a cluster that was started for nothing must not stay
            raise

    @property
    def places(self) -> Mapping[int, Place]:
        """The slots that are up, by number."""
        return {number: slot.place for number, slot in self.slots.items() if slot.place}

    def prefetch(self, node: str, file: HubFile) -> None:
        """Fetch a file on a node, by an actor that every node has one of."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        if node not in self.fetchers:
            self.fetchers[node] = (
                self.ray.remote(Fetcher)
                .options(
                    num_cpus=0, num_gpus=0, max_restarts=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    runtime_env={"env_vars": hidden},
                )
                .remote()
            )  # fmt: skip
        self.fetchers[node].fetch.remote(file)  # nobody waits: the unit sees whether it worked

    def start(self, slot: int, task: Task) -> None:
        """Send a unit to a slot's actor."""
        state = self.slots[slot]
        state.task, state.answered_at, state.pinged_at = task, time.monotonic(), 0.0
        self._call(slot, "run", task.spec.subject, pickle.dumps(task))

    def wait(self, timeout: float) -> list[Finished]:
        """Attempts that ended; a slot that is lost or silent ends its attempt with outcome None.

        Raises:
            ResourceError: The cluster's head is gone, or there was no slot for ten minutes.
        """
        self._forgive_own_silence()
        self._require_head()
        self._require_slots()
        finished = self._look_after_slots()
        deadline = time.monotonic() + (0.0 if finished else timeout)
        while True:
            try:
                event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.listened_at = time.monotonic()
                return finished
            finished += self._hear(event)
            if finished:
                deadline = 0.0  # take what else is there already, and go

    def close(self) -> None:
        """Kill the actors, and the cluster if this executor started it."""
        self.closing.set()
        if self._head_answers():  # or Ray would wait for it, and end this process after 60 s
            for actor in (*(s.actor for s in self.slots.values()), *self.fetchers.values()):
                self.ray.kill(actor, no_restart=True)
        if self.owns_cluster:
            self.ray.shutdown()

    def _actor_class(self) -> Any:
        from pipeline.slot import SlotActor

        threads = {"OMP_NUM_THREADS": str(self.resources.num_cpus)}
        if self.resources.num_gpus == 0:
            threads["CUDA_VISIBLE_DEVICES"] = ""  # Ray no longer hides GPUs from CPU actors
        return self.ray.remote(SlotActor).options(
            num_cpus=self.resources.num_cpus, num_gpus=self.resources.num_gpus,
            max_restarts=-1, max_task_retries=0, max_concurrency=2,
            runtime_env={"env_vars": threads},
        )  # fmt: skip

    def _add_slots(self, number: int) -> None:
        while len(self.slots) < number:
            slot = len(self.slots)
            self.slots[slot] = _Slot(self.remote.remote(self.resources.hang_seconds))
            self._call(slot, "hello")

    def _call(self, slot: int, kind: str, *arguments: object) -> None:
        """Call an actor's method; its answer becomes an event."""
        self.num_calls += 1
        number, state = self.num_calls, self.slots[slot]
        state.calls[kind] = number
        if kind == "hello":
            state.asked_at, state.ask_at = time.monotonic(), None
        reference = getattr(state.actor, kind).remote(*arguments)

        def arrived(future: Any) -> None:
            answer = future.exception() or future.result()
            self.events.put(_Event(kind, slot, number, answer))

        reference.future().add_done_callback(arrived)

    def _await_first(self) -> None:
        """Wait until a slot is up, and a little for the others."""
        started = time.monotonic()
        deadline = started + START_SECONDS
        while len(self.places) < len(self.slots) and time.monotonic() < deadline:
            self.wait(0.1)
            if self.places:
                deadline = min(deadline, time.monotonic() + TOGETHER_SECONDS)
            elif self.refused and not any(s.calls.get("hello") for s in self.slots.values()):
                break
        if self.refused and not self.places:
            raise ResourceError(self.refused)
        if not self.places:
            others = "The cluster reports enough resources, so others may hold them"
            raise ResourceError(
                f"{len(self.slots)} slots did not start within {START_SECONDS:g} s. "
                f"{self.trouble or others}: see `ray status`"
            )

    def _hear(self, event: _Event) -> list[Finished]:
        if event.kind == "nodes":
            return self._see_nodes(event.answer)
        slot = self.slots[event.slot]
        if slot.calls.get(event.kind) != event.call:
            return []  # of a call that was given up
        del slot.calls[event.kind]
        failed = isinstance(event.answer, Exception)
        if event.kind == "run":
            if failed:
                return self._lose(event.slot, event.answer)
            slot.losses = 0
            task, slot.task = slot.task, None
            assert task is not None
            return [Finished(event.slot, task, pickle.loads(event.answer))]
        if event.kind == "hello":
            if failed:
                return self._lose(event.slot, event.answer)
            self._welcome(event.slot, event.answer)
        elif not failed:  # a ping; if it failed, the unit's own call has or will
            slot.answered_at = time.monotonic()
        return []

    def _welcome(self, number: int, hello: Hello) -> None:
        """A slot has answered: it gets units unless it would compute with other code."""
        slot = self.slots[number]
        ours = versions()
        differing = {
            k: (hello.versions.get(k), v) for k, v in ours.items() if hello.versions.get(k) != v
        }
        if differing:  # its rows would not be comparable
            self.refused = (
                f"node {hello.host} runs other versions than this command: {differing} (node, "
                "here). Install the same flatcensus, torch and timm on all nodes"
            )
            _log.warning("%s. It gets no units", self.refused)
        elif hello.is_busy:  # with a unit that was given to another slot meanwhile
            slot.ask_at = time.monotonic() + AGAIN_SECONDS[1]
        else:
            slot.place = Place(hello.node, hello.pool, hello.pool_bytes)

    def _lose(self, number: int, error: Exception | None) -> list[Finished]:
        """A slot is lost: its unit goes back, and it is asked again later."""
        slot = self.slots[number]
        first, longest = AGAIN_SECONDS
        slot.ask_at = time.monotonic() + min(longest, first * 2.0**slot.losses)
        slot.losses += 1
        slot.place = None
        self.trouble = str(error).strip().partition("\n")[0]
        slot.calls.clear()
        if isinstance(error, self.ray.exceptions.ActorDiedError) and not self.closing.is_set():
            slot.actor = self.remote.remote(self.resources.hang_seconds)  # Ray has given it up
        task, slot.task = slot.task, None
        return [] if task is None else [Finished(number, task, None)]

    def _look_after_slots(self) -> list[Finished]:
        """Ask busy slots for a sign of life, and lost ones whether they are back."""
        now, finished = time.monotonic(), list[Finished]()
        for number, slot in self.slots.items():
            due = slot.ask_at is not None and now >= slot.ask_at
            # A question to a machine that was cut off may never be answered nor fail, while Ray
            # has long begun the slot elsewhere.
            if due or (slot.losses and slot.place is None and now - slot.asked_at > SILENT_SECONDS):
                self._call(number, "hello")
            if slot.task is None:
                continue
            if "ping" not in slot.calls and now - slot.pinged_at > PING_SECONDS:
                slot.pinged_at = now
                self._call(number, "ping")
            elif now - max(slot.answered_at, slot.pinged_at) > SILENT_SECONDS:
                _log.warning("slot %d is silent since %.0f s", number, now - slot.answered_at)
                finished += self._lose(number, None)
        return finished

    def _see_nodes(self, nodes: list[dict[str, Any]]) -> list[Finished]:
        """Slots on dead nodes are lost at once; nodes that have joined get slots."""
        alive = {node["NodeID"] for node in nodes}
        finished = list[Finished]()
        for number, slot in self.slots.items():
            if slot.place is not None and slot.place.node not in alive:
                finished += self._lose(number, None)
        if self.address is not None:
            self._add_slots(fitting(nodes, self.resources))
        return finished

    def _forgive_own_silence(self) -> None:
        """What this process slept through (a stopped process, a long plan) nobody else missed."""
        slept = time.monotonic() - self.listened_at
        if slept > LOOK_SECONDS:
            self.head_answered_at += slept
            self.had_slots_at += slept
            for slot in self.slots.values():
                slot.answered_at += slept

    def _require_head(self) -> None:
        silent = time.monotonic() - self.head_answered_at
        if silent > HEAD_SECONDS:
            raise ResourceError(
                f"the head of the Ray cluster does not answer since {silent:.0f} s. What is "
                "committed is safe: start the cluster again, then run the same command"
            )

    def _require_slots(self) -> None:
        """Nodes may come back, and a launch waits for them; but not for ever."""
        if self.places:
            self.had_slots_at, self.has_told = time.monotonic(), False
            return
        told, longest = EMPTY_SECONDS
        empty = time.monotonic() - self.had_slots_at
        if empty > longest:
            raise ResourceError(
                f"the cluster has had no slot for {empty:.0f} s. What is committed is safe: start "
                "nodes again (see `ray status`), then run the same command"
            )
        if empty > told and not self.has_told:
            self.has_told = True
            _log.warning("the cluster has had no slot for %.0f s; waiting for nodes", empty)

    def _head_answers(self) -> bool:
        try:
            knock(self.head)
        except OSError:
            return False
        return True

    def _look(self) -> None:
        """In a thread, since it may block: which nodes are there, if the head answers?"""
        while not self.closing.wait(LOOK_SECONDS):
            try:
                knock(self.head)
                self.events.put(_Event("nodes", -1, 0, alive_nodes(self.ray)))
                self.head_answered_at = time.monotonic()
            except Exception as error:  # whatever Ray raises: the thread must not end unheard
                _log.warning(
                    "the head of the Ray cluster does not answer at %s: %s", self.head, error
                )
