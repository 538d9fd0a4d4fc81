"""Where units run: in this process, or in Ray actors. Both give the same bytes.

An executor has slots; the driver starts one unit per slot and waits. It never retries: Ray's own
retries are off, because they hide crashes and repeat out-of-memory without end.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.entries import ResourceSpec
from pipeline.errors import ResourceError
from pipeline.hub_file import HubFile
from pipeline.prefetch import Fetcher

if TYPE_CHECKING:
    from pipeline.outcome import Outcome
    from pipeline.specs import Task

SLOT_START_SECONDS = 120.0  # an actor that is not up by then never will be: chosen
KNOCK_SECONDS = 10.0  # for a cluster's head to accept a connection: chosen


@dataclass(frozen=True)
class Finished:
    """One attempt that ended. ``outcome`` is None when the slot or its node was lost."""

    slot: int
    task: Task
    outcome: Outcome | None


class Executor(Protocol):
    """Slots that do units."""

    @property
    def num_slots(self) -> int:
        """How many units run at once."""
        ...

    @property
    def nodes(self) -> tuple[str, ...]:
        """The machine of every slot."""
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

    def close(self, *, now: bool = False) -> None:
        """Release the slots; ``now`` abandons what runs."""
        ...


class InlineExecutor:
    """Units in this process, one at a time: for debugging and for machines without Ray."""

    def __init__(self, resources: ResourceSpec) -> None:
        from pipeline.worker import Workbench

        if resources.num_gpus > 0:
            import torch

            if not torch.cuda.is_available():
                raise ResourceError(_no_gpu(resources, "torch sees no CUDA device on this machine"))
        self.bench = Workbench()
        self.finished: list[Finished] = []
        self.fetcher: Fetcher | None = None

    @property
    def num_slots(self) -> int:
        """One."""
        return 1

    @property
    def nodes(self) -> tuple[str, ...]:
        """This machine."""
        return ("here",)

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

    def close(self, *, now: bool = False) -> None:
        """Nothing to release."""


class RayExecutor:
    """One actor per slot; each runs its units in a child process (pipeline/slot.py)."""

    def __init__(self, resources: ResourceSpec, *, address: str | None = None) -> None:
        import ray
        import ray.exceptions

        from pipeline.slot import SlotActor

        self.ray: Any = ray
        self.owns_cluster = not ray.is_initialized()
        if self.owns_cluster:
            _connect(address)
        self.actors: list[Any] = []
        self.slot_nodes: tuple[str, ...] = ()
        self.fetchers: dict[str, Any] = {}
        self.running: dict[Any, tuple[int, Task]] = {}
        options: dict[str, Any] = {
            "num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus,
            "max_restarts": -1, "max_task_retries": 0,
            "runtime_env": {"env_vars": _environment(resources)},
        }  # fmt: skip
        remote = ray.remote(SlotActor)
        try:
            where = address or "this machine"
            for _ in range(slots_that_fit(ray.cluster_resources(), resources, where=where)):
                self.actors.append(remote.options(**options).remote(resources.hang_seconds))
            self._check_versions()
        except ResourceError:
            self.close()  # a cluster that was started for nothing must not stay
            raise

    @property
    def num_slots(self) -> int:
        """Actors that fit the cluster, at most ``max_slots``."""
        return len(self.actors)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ray's node of every slot, as it was when the slots came up."""
        return self.slot_nodes

    def prefetch(self, node: str, file: HubFile) -> None:
        """Fetch a file on a node, by an actor that every node has one of."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if node not in self.fetchers:
            self.fetchers[node] = (
                self.ray.remote(Fetcher)
                .options(
                    num_cpus=0, num_gpus=0, max_restarts=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
                )
                .remote()
            )  # fmt: skip
        self.fetchers[node].fetch.remote(file)  # nobody waits: the unit sees whether it worked

    def start(self, slot: int, task: Task) -> None:
        """Send a unit to a slot's actor."""
        self.running[self.actors[slot].run.remote(task.spec.subject, pickle.dumps(task))] = (
            slot,
            task,
        )

    def wait(self, timeout: float) -> list[Finished]:
        """Attempts that ended; a lost actor ends its attempt with outcome None."""
        if not self.running:
            return []
        ready, _ = self.ray.wait(
            list(self.running), num_returns=1, timeout=timeout, fetch_local=True
        )
        finished = []
        for ref in ready:
            slot, task = self.running.pop(ref)
            try:
                outcome = pickle.loads(self.ray.get(ref))
            except self.ray.exceptions.RayError:  # the slot, its node or its start-up
                outcome = None
            finished.append(Finished(slot, task, outcome))
        return finished

    def close(self, *, now: bool = False) -> None:
        """Kill the actors, and the cluster if this executor started it."""
        for actor in (*self.actors, *self.fetchers.values()):
            self.ray.kill(actor, no_restart=True)
        if self.owns_cluster:
            self.ray.shutdown()

    def _check_versions(self) -> None:
        """Refuse slots that would compute with other code: their rows would not be comparable."""
        from pipeline.versions import versions

        ours = versions()
        refs = [actor.versions.remote() for actor in self.actors]
        ready, late = self.ray.wait(refs, num_returns=len(refs), timeout=SLOT_START_SECONDS)
        if late:
            raise ResourceError(
                f"{len(late)} of {len(refs)} slots did not start within {SLOT_START_SECONDS:g} s. "
                "The cluster reports enough resources, so others may hold them: see `ray status`"
            )
        for theirs in self.ray.get(ready):
            differing = {k: (theirs.get(k), v) for k, v in ours.items() if theirs.get(k) != v}
            if differing:
                raise ResourceError(
                    f"a node runs other versions than this command: {differing} (node, here). "
                    "Install the same flatcensus, torch and timm on all nodes"
                )
        self.slot_nodes = tuple(self.ray.get([actor.node.remote() for actor in self.actors]))


def slots_that_fit(cluster: Mapping[str, float], resources: ResourceSpec, *, where: str) -> int:
    """Slots for a cluster's total resources. Raises ResourceError if not even one fits."""
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    if resources.num_gpus > gpus:
        raise ResourceError(_no_gpu(resources, f"{where} has {gpus:g} GPUs"))
    if resources.num_cpus > cpus:
        raise ResourceError(
            f"resources.num_cpus = {resources.num_cpus} per slot, but {where} has {cpus:g} CPUs. "
            "Lower num_cpus in [resources]"
        )
    fits = int(cpus // resources.num_cpus)
    if resources.num_gpus > 0:
        fits = min(fits, int(gpus / resources.num_gpus + 1e-9))
    return min(fits, resources.max_slots or fits)


def _connect(address: str | None) -> None:
    import logging

    import ray

    options: dict[str, Any] = {
        "logging_level": logging.ERROR, "log_to_driver": False, "ignore_reinit_error": True,
    }  # fmt: skip
    if address is None:
        # "local", or Ray would join a cluster that RAY_ADDRESS or a file in /tmp names.
        ray.init("local", include_dashboard=False, num_cpus=os.cpu_count(), **options)
        return
    try:
        _knock(address)  # Ray itself would try for two minutes
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({error}). Start one with "
            "`ray start --head`, or use --on local"
        ) from error


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at ``[ray://]host:port``; other addresses are Ray's."""
    match = re.fullmatch(r"(?:ray://)?([^/:]+):([0-9]+)", address)
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=KNOCK_SECONDS).close()


def _environment(resources: ResourceSpec) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(resources.num_cpus)}
    if resources.num_gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray no longer hides GPUs from CPU actors
    return environment


def _no_gpu(resources: ResourceSpec, found: str) -> str:
    return (
        f"resources.num_gpus = {resources.num_gpus:g} per slot, but {found}. "
        "Set num_gpus = 0 to run on CPU, or launch --on the address of a cluster with GPUs"
    )
