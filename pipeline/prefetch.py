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
from typing import Protocol

from pipeline.errors import FlatcensusError
from pipeline.hub_file import HubFile


class Fetching(Protocol):
    """The part of an executor that prefetches."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Node of every slot."""
        ...

    def prefetch(self, node: str, file: HubFile) -> None:
        """Begin to fetch a file on a node; returns at once."""
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

    def update(self, upcoming: Iterable[str], taken: Container[str], executor: Fetching) -> None:
        """Fetch the next checkpoints where there is room.

        Args:
            upcoming: Subjects with units that wait, in the order in which slots will take them.
            taken: Subjects that slots have now.
            executor: Fetches.
        """
        waiting = [s for s in upcoming if s in self.files and s not in taken]
        self.assigned = {s: node for s, node in self.assigned.items() if s in waiting}
        room = {node: self.per_slot * n for node, n in Counter(executor.nodes).items()}
        for node in self.assigned.values():
            room[node] -= 1
        for subject in waiting:
            node = max(room, key=lambda n: room[n])
            if room[node] <= 0:
                return
            if subject not in self.assigned:
                self.assigned[subject] = node
                room[node] -= 1
                executor.prefetch(node, self.files[subject])

    def on(self, node: str) -> set[str]:
        """Subjects whose weights are fetched on a node."""
        return {s for s, n in self.assigned.items() if n == node}
