"""Input-invariant sensitivity: the input Jacobian with every column weighted by its pixel (Eq. 43).

For image i with J = d f(x_i) / d x_i, x the tensor that is fed to the network after preprocessing,
of M scalars:

    input_invariant_mls       = mean_i sum_p ||d f / d x_p||^2 x_p^2 = mean_i ||J diag(x)||_F^2
    input_invariant_mls_jvp_x = mean_i ||J x||^2 / M                        both in units [f]^2

The first does not change when input scalars are rescaled and the first layer's weights undo it, and
for every image it is at most ||x||^2 sigma_1(J)^2 (``normalized_mls``). The second is what the
paper's code computes, one Jacobian-vector product in the direction of the image: a lower bound,
too small by up to a factor M. It is exact up to rounding with every method.

``exact`` sums over all rows of J; its intervals allow for four times the rounding defect of the
network's products (``tasks.self_test``). ``hutchinson`` samples ||x * J^T u||^2 with random signs u
after Lanczos steps took the top of the spectrum out, and states an error (``tasks.deflated``).
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import pydantic
import torch

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.finite import checked_jacobian
from tasks.jacobian import DOUBLE_GRAPH_COST, JVP_COST
from tasks.jacobian_moments import (
    FEW_ROWS,
    jacobian_moments,
    predicted_cost,
    probed_status,
)
from tasks.layer_rows import (
    GRAPH_COST,
    IMAGE,
    ROW_COST,
    memory_text,
    num_rows,
    plan_rows,
    reduce_rows,
)
from tasks.measurement import Batch, Columns, Estimate, Measurement, Row, Status, Subject
from tasks.outline import Outline
from tasks.sample_mean import sample_mean
from tasks.self_test import self_test

_NAME = "input_invariant_mls"
_AUTHORS_NAME = "input_invariant_mls_jvp_x"
_ALLOWANCE = 4  # interval widening in units of the self-test's defect; chosen


class InputInvariantMls(Measurement):
    """Settings of the input-invariant sensitivity.

    Attributes:
        method: ``exact`` computes the rows that span J. ``hutchinson`` samples and has an error
            per image. ``auto`` takes ``exact`` for up to 64 rows (outputs, or features of the
            linear head if fewer), where it costs no more.
        target_relative_stderr: Of each image (``hutchinson``). The error of the mean over n images
            that comes from probes is the root of n smaller.
        max_draws: Probes per image at most (``hutchinson``).
        memory_gib: Rows held at once, in GiB (``exact``). Less memory means more passes.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (_NAME, _AUTHORS_NAME)
    coverage_fields: ClassVar[frozenset[str]] = frozenset({"memory_gib"})

    method: Literal["auto", "exact", "hutchinson"] = "auto"
    target_relative_stderr: float = pydantic.Field(default=0.02, gt=0)
    max_draws: int = pydantic.Field(default=128, ge=8)
    memory_gib: float = pydantic.Field(default=2.0, gt=0)

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Two rows per image; work and time are on the ``input_invariant_mls`` row of the pair.

        Raises:
            MeasurementError: If the network fails the self-test, gives NaN for an image, or the
                rows of one image take more than ``memory_gib`` (``exact``).
        """
        defect = _ALLOWANCE * self_test(subject).defect
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            if self._resolved(num_rows(subject, batch)) == "exact":
                found = _exact_rows(subject, batch, defect, self.memory_gib)
            else:
                found = self._probe_rows(subject, batch, defect)
            seconds = (time.perf_counter() - started) / len(chunk)
            rows += [replace(r, seconds=seconds) if r.quantity == _NAME else r for r in found]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Means over images with Student intervals; ``stderr_draws`` is the probes' part."""
        return [sample_mean(rows, quantity) for quantity in self.quantities]

    def forward_equivalents(self, network: Outline) -> float:
        """Predicted work per image; probes as trained networks need them."""
        if self._resolved(network.jacobian_rows) == "exact":
            return GRAPH_COST + ROW_COST * network.jacobian_rows
        return predicted_cost(self.max_draws) + DOUBLE_GRAPH_COST + JVP_COST

    def note(self, network: Outline) -> str:
        """The method that ``auto`` takes, and the memory of one image."""
        exact = self._resolved(network.jacobian_rows) == "exact"
        count = network.jacobian_rows if exact else self.max_draws
        size = int(np.prod(network.data_config["input_size"]))
        what = "exact rows" if exact else "probes at most"
        return f"{count} {what}, {memory_text(count, size)} per image"

    def _resolved(self, rows: int) -> str:
        """``exact`` or ``hutchinson``: a function of the settings and the network's sizes alone."""
        if self.method != "auto":
            return self.method
        return "exact" if rows <= FEW_ROWS else "hutchinson"

    def _probe_rows(self, subject: Subject, batch: Batch, defect: float) -> list[Row]:
        found = jacobian_moments(
            subject,
            batch,
            metric=_NAME,
            weight=batch.inputs.detach().flatten(1),
            ratio=False,
            target_relative_stderr=self.target_relative_stderr,
            max_draws=self.max_draws,
        )
        along = checked_jacobian(subject, batch).jvp(batch.inputs.detach())
        authors = (along.square().sum(1) / batch.inputs[0].numel()).cpu().numpy()
        rows: list[Row] = []
        for i, sample in enumerate(batch.samples):
            value = float(found.norm_squared[i])
            rows += [
                Row(
                    quantity=_NAME,
                    value=value,
                    sample=sample,
                    stderr=float(found.norm_squared_stderr[i]),
                    status=probed_status(value, converged=value == 0 or bool(found.converged[i])),
                    num_iterations=int(found.num_steps[i]),
                    num_probes=int(found.num_probes[i]),
                    forward_equivalents=float(found.forward_equivalents[i])
                    + DOUBLE_GRAPH_COST
                    + JVP_COST,
                ),
                _authors_row(float(authors[i]), value, batch.inputs[0].numel(), sample, defect),
            ]
        return rows


def _exact_rows(subject: Subject, batch: Batch, defect: float, memory_gib: float) -> list[Row]:
    images = dict(zip(batch.samples, batch.inputs.detach().flatten(1), strict=True))

    def reduce(
        _name: str, samples: tuple[int, ...], rows: torch.Tensor, scale: torch.Tensor
    ) -> np.ndarray:
        """||J diag(x)||_F^2 and ||J x||^2 of each image, (B, 2)."""
        x = torch.stack([images[sample] for sample in samples]).double()
        total = scale.new_zeros((len(samples), 2))
        for k in range(rows.shape[1]):  # row by row: float64 copies of all would not fit
            weighted = rows[:, k].double() * x * scale[:, k, None]
            total += torch.stack([weighted.square().sum(1), weighted.sum(1).square()], 1)
        return total.cpu().numpy()

    plan = plan_rows(subject, batch, image=True, layers=False, memory_gib=memory_gib)
    found = reduce_rows(subject, batch, plan, reduce)[IMAGE]
    found[:, 1] /= batch.inputs[0].numel()
    rows: list[Row] = []
    for sample, (value, authors) in zip(batch.samples, found.tolist(), strict=True):
        row = replace(
            _rounded(_NAME, value, sample, defect),
            num_iterations=plan.num_rows,
            forward_equivalents=plan.forward_equivalents,
        )
        rows += [row, _authors_row(authors, value, batch.inputs[0].numel(), sample, defect)]
    return rows


def _authors_row(value: float, norm_squared: float, size: int, sample: int, defect: float) -> Row:
    """Row of ||J x||^2 / M. Where its sums over pixels cancel, rounding is that of their terms."""
    row = _rounded(_AUTHORS_NAME, value, sample, defect)
    if not (math.isfinite(value) and math.isfinite(norm_squared)):
        return row
    root, error = math.sqrt(value), defect * math.sqrt(max(norm_squared / size, value))
    return replace(row, lower=max(0.0, root - error) ** 2, upper=(root + error) ** 2)


def _rounded(quantity: str, value: float, sample: int, defect: float) -> Row:
    """A row that is exact up to rounding of the products."""
    return Row(
        quantity=quantity,
        value=value,
        sample=sample,
        lower=value * max(0.0, 1 - defect) ** 2,
        upper=value * (1 + defect) ** 2,
        status=Status.OK if np.isfinite(value) else Status.NOT_FINITE,
    )
