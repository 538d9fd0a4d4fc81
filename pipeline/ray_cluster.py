"""The Ray cluster of a launch: joining it, its living nodes, and the slots that fit on them."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.entries import ResourceSpec
from pipeline.errors import ResourceError
from pipeline.executor import no_gpu
from pipeline.shipping import driver_env

KNOCK_SECONDS = 10.0  # for a cluster's head to accept a connection: chosen


def slots_that_fit(
    nodes: Iterable[Mapping[str, Any]], resources: ResourceSpec, *, where: str
) -> int:
    """Slots for a cluster's nodes, as ``ray.nodes()`` lists them.

    Raises:
        ResourceError: Not even one fits.
    """
    nodes = list(nodes)
    fits = fitting(nodes, resources)
    if fits:
        return fits
    cpus, gpus = (
        max((node["Resources"].get(name, 0.0) for node in nodes), default=0.0)
        for name in ("CPU", "GPU")
    )
    if resources.num_gpus > gpus:
        raise ResourceError(no_gpu(resources, f"{where} has {gpus:g} GPUs on a node"))
    raise ResourceError(
        f"resources.num_cpus = {resources.num_cpus} per slot, but {where} has {cpus:g} CPUs on a "
        "node. Lower num_cpus in [resources]"
    )


def fitting(nodes: Iterable[Mapping[str, Any]], resources: ResourceSpec) -> int:
    """Slots that fit, node by node: a slot does not span two."""
    fits = 0
    for node in nodes:
        here = int(node["Resources"].get("CPU", 0.0) // resources.num_cpus)
        if resources.num_gpus > 0:
            here = min(here, int(node["Resources"].get("GPU", 0.0) / resources.num_gpus + 1e-9))
        fits += here
    return min(fits, resources.max_slots or fits)


def alive_nodes(ray: Any) -> list[dict[str, Any]]:
    """The nodes that are there, as ``ray.nodes()`` lists them."""
    return [node for node in ray.nodes() if node["Alive"]]


def connect(address: str | None) -> None:
    """Join the cluster at an address, or start Ray on this machine alone.

    Raises:
        ResourceError: No cluster answers there.
    """
    import ray

    options: dict[str, Any] = {
        "logging_level": logging.ERROR, "log_to_driver": False, "ignore_reinit_error": True,
    }  # fmt: skip
    if address is None:
        # "local", or Ray would join a cluster that RAY_ADDRESS or a file in /tmp names.
        ray.init("local", include_dashboard=False, num_cpus=os.cpu_count(), **options)
        return
    try:
        knock(address)  # Ray itself would try for two minutes
        ray.init(address=address, runtime_env=driver_env(), **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({error}). Start one with "
            "`ray start --head`, or use --on local"
        ) from error


def knock(address: str) -> None:
    """Raise OSError if nothing listens at ``[ray://]host:port``; other addresses are Ray's."""
    match = re.fullmatch(r"(?:ray://)?([^/:]+):([0-9]+)", address)
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=KNOCK_SECONDS).close()
