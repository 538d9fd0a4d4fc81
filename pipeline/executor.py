"""Where units run: the interface, and the executor that is this process.

An executor has slots; the scheduler starts one unit per slot and waits. It never retries, and it
gives the same bytes wherever it is: in this process (here) or in Ray actors (ray_executor.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.entries import ResourceSpec
from pipeline.errors import ResourceError
from pipeline.hub_file import HubFile
from pipeline.prefetch import Fetcher

if TYPE_CHECKING:
    from pipeline.outcome import Outcome
    from pipeline.specs import Task


@dataclass(frozen=True)
class Finished:
    """One attempt that ended. ``outcome`` is None when the slot or its node was lost."""

    slot: int
    task: Task
    outcome: Outcome | None


@dataclass(frozen=True)
class Place:
    """Where a slot is. Slots of one ``pool`` share memory: a machine's, or a GPU's.

    ``pool_bytes`` is its size; None where it is not known.
    """

    node: str
    pool: str
    pool_bytes: int | None = None


class Executor(Protocol):
    """Slots that do units."""

    @property
    def places(self) -> Mapping[int, Place]:
        """The slots that are up, by number. They may come and go while units run."""
        ...

    def prefetch(self, node: str, file: HubFile) -> None:
        """Begin to fetch a file on a machine; returns at once."""
        ...

    def start(self, slot: int, task: Task) -> None:
        """Begin a unit on an idle slot."""
        ...

    def wait(self, timeout: float) -> list[Finished]:
        """Attempts that ended, after at most ``timeout`` seconds."""
        ...

    def close(self) -> None:
        """Release the slots and abandon what runs."""
        ...


class InlineExecutor:
    """Units in this process, one at a time: for debugging and for machines without Ray."""

    def __init__(self, resources: ResourceSpec) -> None:
        from pipeline.worker import Workbench

        if resources.num_gpus > 0:
            import torch

            if not torch.cuda.is_available():
                raise ResourceError(no_gpu(resources, "torch sees no CUDA device on this machine"))
        self.bench = Workbench()
        self.finished: list[Finished] = []
        self.fetcher: Fetcher | None = None

    @property
    def places(self) -> Mapping[int, Place]:
        """One slot, which has the machine for itself."""
        return {0: Place("here", "here")}

    def prefetch(self, node: str, file: HubFile) -> None:
        """Fetch a file in a thread beside the units."""
        self.fetcher = self.fetcher or Fetcher()
        self.fetcher.fetch(file)

    def start(self, slot: int, task: Task) -> None:
        """Do the unit now."""
        from pipeline.worker import run_unit

        self.finished.append(Finished(slot, task, run_unit(task, self.bench)))

    def wait(self, timeout: float) -> list[Finished]:
        """What ``start`` has done since the last call."""
        done, self.finished = self.finished, []
        return done

    def close(self) -> None:
        """Nothing to release."""


def no_gpu(resources: ResourceSpec, found: str) -> str:
    """The message for GPUs that are asked for and not there."""
    return (
        f"resources.num_gpus = {resources.num_gpus:g} per slot, but {found}. "
        "Set num_gpus = 0 to run on CPU, or launch --on the address of a cluster with GPUs"
    )
