"""``flatcensus doctor``: what this machine has, and what would keep a launch from running."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from pipeline.errors import FlatcensusError
from pipeline.versions import versions


class Finding(NamedTuple):
    """One checked thing: ``state`` is ok, warn (limits what can be done) or fail."""

    check: str
    state: str
    detail: str


def examine(on: str, run: str | None = None) -> pd.DataFrame:
    """Check versions, machine, images and what ``--on`` names; with a run, who reaches it."""
    findings = [*_versions(), *_machine(), *_datasets(), *_hub()]
    if on in ("inline", "local"):
        findings += _executor(on)
    else:
        from pipeline.cluster_doctor import examine_cluster

        findings += examine_cluster(on, run)
    return pd.DataFrame(findings, columns=list(Finding._fields))


def _versions() -> Iterator[Finding]:
    found = {"python": platform.python_version(), **versions()}
    yield Finding("versions", "ok", ", ".join(f"{k} {v}" for k, v in found.items()))


def _machine() -> Iterator[Finding]:
    import torch

    yield Finding("cpus", "ok", f"{os.cpu_count()} ({platform.machine()})")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("gpus", "ok", ", ".join(names))
    else:
        yield Finding("gpus", "warn", "none seen by torch: set resources.num_gpus = 0")
    free = shutil.disk_usage(".").free
    state = "ok" if free > 2e9 else "warn"
    yield Finding("disk", state, f"{free / 1e9:.0f} GB free here")


def _datasets() -> Iterator[Finding]:
    from tasks.datasets import DatasetError, load_dataset

    for name in ("digits", "fashion-mnist"):
        try:
            dataset = load_dataset(name, split="test")
        except DatasetError as error:
            yield Finding(name, "warn", str(error))
        else:
            yield Finding(name, "ok", f"{len(dataset)} test images")


def _hub() -> Iterator[Finding]:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    token = bool(os.environ.get("HF_TOKEN"))
    detail = "offline: only cached weights" if offline else "online"
    yield Finding("hub", "ok", f"{detail}; token {'set' if token else 'not set'}")


def _executor(on: str) -> Iterator[Finding]:
    from pipeline.entries import ResourceSpec
    from pipeline.executor import InlineExecutor
    from pipeline.ray_executor import RayExecutor

    try:
        executor = InlineExecutor(ResourceSpec()) if on == "inline" else RayExecutor(ResourceSpec())
    except FlatcensusError as error:
        yield Finding(f"executor {on}", "fail", str(error))
        return
    yield Finding(f"executor {on}", "ok", f"{len(executor.places)} slots of 1 CPU")
    executor.close()
