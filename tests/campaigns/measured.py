"""What a campaign measures: numbers that are known, after a pause, with every attempt written down.

Its numbers depend on the weights and the sample alone, so they survive any batch size and any cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from pathlib import Path
from typing import ClassVar

import numpy as np

from campaigns.workshop import FOLDER
from tasks.block import Block
from tasks.measurement import Check, Columns, Estimate, Measurement, Row, Subject
from tasks.outline import Outline
from tasks.registry import METRICS
from tasks.sample_mean import sample_mean

ATTEMPTS, OUT_OF_MEMORY = "attempts.jsonl", "out-of-memory"
LAYERS = ("stem", "head")
UNIT_SAMPLES = 4
GIB = 2**30


class Steady(Measurement):
    """A number of every sample, and one for each of two layers.

    Attributes:
        seconds: Pause of every unit.
        batch: Samples per unit.
    """

    metric: ClassVar[str] = "steady"
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = ("steady", "double")
    coverage_fields: ClassVar[frozenset[str]] = frozenset({"seconds"})

    seconds: float = 0.1

    @property
    def alignment(self) -> int:
        return UNIT_SAMPLES

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        weights = next(subject.model.parameters()).detach().double()
        size = float(weights.abs().sum())
        unit = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]
        samples = (block.samples.start, block.samples.stop)
        _note("begin", unit, samples)
        _run_out_of_memory()
        subject.batch(list(block.samples))  # read the images, as every measurement does
        time.sleep(self.seconds)
        rows = []
        for sample in block.samples:
            value = size * (1 + np.sin(sample))
            rows += [Row("steady", value, sample=sample), Row("double", 2 * value, sample=sample)]
            rows += [
                Row("layer_steady", value + i, sample=sample, layer=layer)
                for i, layer in enumerate(LAYERS)
            ]
        _note("end", unit, samples)
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        layer_wise = []
        for layer in LAYERS:
            values = rows["value"][rows["layer"] == layer]
            mean, spread = float(values.mean()), float(values.std())
            layer_wise.append(
                Estimate("layer_steady", mean, spread, mean - spread, mean + spread, len(values),
                         len(values), layer=layer)
            )  # fmt: skip
        return [sample_mean(rows, name) for name in self.quantities] + layer_wise

    def checks(self, rows: Columns) -> list[Check]:
        largest = float(rows["value"].max())
        return [Check("11", "printed", largest, 2 * largest, True, False, True, "none", len(rows))]

    def forward_equivalents(self, network: Outline) -> float:
        return 1.0


METRICS.setdefault("steady", Steady)  # where this module is loaded, so in campaigns alone


def _note(what: str, unit: str, samples: tuple[int, int]) -> None:
    """One line about an attempt; appended at once, so that a killed process leaves it whole."""
    line = {"what": what, "unit": unit, "samples": samples, "pid": os.getpid(), "at": _now()}
    data = (json.dumps(line) + "\n").encode()
    descriptor = os.open(_folder() / ATTEMPTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _run_out_of_memory() -> None:
    """Once for every request, ask for more memory than this process may have."""
    try:
        (_folder() / OUT_OF_MEMORY).unlink()
    except FileNotFoundError:
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + GIB, before[1]))
    try:
        bytearray(2 * GIB)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def _now() -> float:
    """Seconds since this machine started: the same for all processes, whatever the clock says."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
