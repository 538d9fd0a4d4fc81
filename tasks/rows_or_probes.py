"""Measurements of the whole input Jacobian that have its rows, or sample it where they are many.

What the two share: the settings of both ways, the choice between them, and the loop over batches.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import replace
from math import prod
from typing import ClassVar

import pydantic

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.jacobian_moments import FEW_ROWS, predicted_cost
from tasks.layer_rows import GRAPH_COST, ROW_COST, memory_text, num_rows
from tasks.measurement import Batch, Columns, Estimate, Measurement, Row, Subject
from tasks.outline import Outline
from tasks.sample_mean import sample_mean
from tasks.self_test import self_test

_ALLOWANCE = 4  # interval widening in units of the self-test's defect; chosen


class RowsOrProbes(Measurement):
    """Settings that both have, beside their ``method``.

    Attributes:
        method: ``auto`` has the rows where there are up to 64 (outputs, or features of the linear
            head if fewer), where they cost no more.
        target_relative_stderr: Of each image and quantity that is sampled. The error of the mean
            over n images that comes from probes is the root of n smaller.
        max_draws: Probes per image at most.
        memory_gib: Rows held at once, in GiB. Less memory means more passes.
    """

    coverage_fields: ClassVar[frozenset[str]] = frozenset({"memory_gib"})
    # What sampling costs per image beside its probes, in no-grad forwards.
    probe_overhead: ClassVar[float] = 0.0

    method: str  # subclasses narrow it to their names, which is sound for what is frozen
    target_relative_stderr: float = pydantic.Field(default=0.02, gt=0)
    max_draws: int = pydantic.Field(default=128, ge=8)
    memory_gib: float = pydantic.Field(default=2.0, gt=0)

    @abstractmethod
    def exact_rows(self, subject: Subject, batch: Batch, defect: float) -> list[Row]:
        """Rows of a batch from all rows of its Jacobians; ``defect`` is the rounding allowed for.

        Raises:
            MeasurementError: If the rows of one image take more than ``memory_gib``.
        """

    @abstractmethod
    def probe_rows(self, subject: Subject, batch: Batch, defect: float) -> list[Row]:
        """Rows of a batch by sampling its Jacobians."""

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Two rows per image; work and time are on the row of the first quantity.

        Raises:
            MeasurementError: If the network fails the self-test, gives NaN for an image, or the
                rows of one image take more than ``memory_gib``.
        """
        defect = _ALLOWANCE * self_test(subject).defect
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            has_rows = self.has_rows(num_rows(subject, batch))
            found = (self.exact_rows if has_rows else self.probe_rows)(subject, batch, defect)
            seconds = (time.perf_counter() - started) / len(chunk)
            first = self.quantities[0]
            rows += [replace(r, seconds=seconds) if r.quantity == first else r for r in found]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Means over images with Student intervals; ``stderr_draws`` is the probes' part."""
        return [sample_mean(rows, quantity) for quantity in self.quantities]

    def forward_equivalents(self, network: Outline) -> float:
        """Predicted work per image; probes as trained networks need them."""
        if self.has_rows(network.jacobian_rows):
            return GRAPH_COST + ROW_COST * network.jacobian_rows
        return predicted_cost(self.max_draws) + self.probe_overhead

    def note(self, network: Outline) -> str:
        """The way that ``auto`` takes, and the memory of one image."""
        has_rows = self.has_rows(network.jacobian_rows)
        count = network.jacobian_rows if has_rows else self.max_draws
        what = "exact rows" if has_rows else "probes at most"
        size = prod(network.data_config["input_size"])
        return f"{count} {what}, {memory_text(count, size)} per image"

    def has_rows(self, count: int) -> bool:
        """Whether all ``count`` rows are computed: by settings and the network's sizes alone."""
        if self.method == "auto":
            return count <= FEW_ROWS
        return self.method in ("exact", "dense")
