"""Weights of the next checkpoints, fetched on a node while its slots compute.

The driver assigns upcoming checkpoints to nodes, at most ``resources.prefetch`` for each of their
slots; one fetcher per node downloads them in turn. What it fails to get is left to the unit, which
says why.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import FlatcensusError
from pipeline.hub_file import HubFile

if TYPE_CHECKING:
    from pipeline.executor import Place


class Fetching(Protocol):
    """The part of an executor that prefetches."""

    @property
    def places(self) -> Mapping[int, Place]:
        """Where the slots are."""
        ...

    def prefetch(self, node: str, file: HubFile) -> None:
        """Begin to fetch a file on a node; returns at once."""
        ...


class Waiting(Protocol):
    """The part of the queue that tells what comes."""

    def __contains__(self, subject: object) -> bool:
        """Whether a subject has units that wait."""
        ...

    def upcoming(self) -> Iterable[str]:
        """Subjects that wait, in about the order in which slots will take them."""
        ...


class Fetcher:
    """Downloads in turn, in a thread of its own; the Ray actor of a node is one of these."""

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[HubFile] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def fetch(self, file: HubFile) -> None:
        """Add a file to what is to be fetched."""
        self.todo.put(file)

    def _work(self) -> None:
        from pipeline import hub_cache
        from pipeline.download import download

        while True:
            file = self.todo.get()
            if hub_cache.cached(file) is None and hub_cache.fits([file]):
                with contextlib.suppress(FlatcensusError):  # the unit will meet it and report it
                    download(file)


class Ahead:
    """Which checkpoints are fetched ahead, and where.

    Attributes:
        assigned: Node by subject, for checkpoints that no slot has taken yet.
    """

    def __init__(self, files: Mapping[str, HubFile], *, per_slot: int) -> None:
        """``files`` by subject; ``per_slot`` of them at most wait fetched for each slot."""
        self.files, self.per_slot = files, per_slot
        self.assigned: dict[str, str] = {}

    def update(self, queue: Waiting, taken: Container[str], executor: Fetching) -> None:
        """Fetch the next checkpoints where there is room.

        Args:
            queue: The units that wait.
            taken: Subjects that slots have now.
            executor: Fetches.
        """
        if not self.files:
            return
        waiting = {s: n for s, n in self.assigned.items() if s in queue and s not in taken}
        self.assigned = waiting
        nodes = Counter(place.node for place in executor.places.values())
        room = {node: self.per_slot * number for node, number in nodes.items()}
        for node in waiting.values():
            room[node] = room.get(node, 0) - 1
        if max(room.values(), default=0) <= 0:
            return
        for subject in queue.upcoming():
            if subject not in self.files or subject in taken or subject in waiting:
                continue
            node = max(room, key=lambda n: room[n])
            if room[node] <= 0:
                return
            waiting[subject] = node
            room[node] -= 1
            executor.prefetch(node, self.files[subject])

    def on(self, node: str) -> set[str]:
        """Subjects whose weights are fetched on a node."""
        return {s for s, n in self.assigned.items() if n == node}
