"""Local dimensionality: the participation ratio of the spectrum of each image's input Jacobian.

For image i with J = d f(x_i) / d x_i and C = J J^T, the covariance of the outputs under small
isotropic noise of the input (Eq. 13-15):

    local_dimensionality  = mean_i (Tr C)^2 / Tr C^2      no units, between 1 and min(N, M)
    jacobian_norm_squared = mean_i Tr C = mean_i ||J||_F^2      units ([f] / [x])^2

The dimensionality is 1 where one direction of the output moves alone, r where r directions move
equally, and does not change with the scale of f or x. It is undefined where J = 0: such an image
is NaN with status ``not_finite``, and makes the mean NaN.

``dense`` takes all singular values; its intervals allow for four times the rounding defect of the
network's products (``tasks.self_test``). ``probes`` knows the top of the spectrum from Lanczos
steps, samples the rest and states a standard error for each image (``tasks.deflated``).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import pydantic

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.jacobian_moments import (
    FEW_ROWS,
    jacobian_moments,
    predicted_cost,
    probed_status,
)
from tasks.layer_rows import GRAPH_COST, IMAGE, ROW_COST, memory_text, num_rows
from tasks.measurement import Batch, Columns, Estimate, Measurement, Row, Status, Subject
from tasks.outline import Outline
from tasks.sample_mean import sample_mean
from tasks.self_test import self_test
from tasks.spectra import spectra

_NAME = "local_dimensionality"
_NORM_NAME = "jacobian_norm_squared"
_ALLOWANCE = 4  # interval widening in units of the self-test's defect; chosen


class LocalDimensionality(Measurement):
    """Settings of the participation ratio and the Frobenius norm of the input Jacobian.

    Attributes:
        method: ``dense`` computes the rows that span J, exact up to rounding. ``probes`` samples
            and has an error per image. ``auto`` takes ``dense`` for up to 64 rows (outputs, or
            features of the linear head if fewer), where it costs no more.
        target_relative_stderr: Of each image and quantity (``probes``). The error of the mean over
            n images that comes from probes is the root of n smaller.
        max_draws: Probes per image at most (``probes``).
        memory_gib: Rows held at once, in GiB (``dense``). Less memory means more passes.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (_NAME, _NORM_NAME)
    coverage_fields: ClassVar[frozenset[str]] = frozenset({"memory_gib"})

    method: Literal["auto", "dense", "probes"] = "auto"
    target_relative_stderr: float = pydantic.Field(default=0.02, gt=0)
    max_draws: int = pydantic.Field(default=128, ge=8)
    memory_gib: float = pydantic.Field(default=2.0, gt=0)

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Two rows per image; work and time are on the ``local_dimensionality`` row of the pair.

        Raises:
            MeasurementError: If the network fails the self-test, gives NaN for an image, or the
                rows of one image take more than ``memory_gib`` (``dense``).
        """
        defect = _ALLOWANCE * self_test(subject).defect
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            if self._resolved(num_rows(subject, batch)) == "dense":
                found = _dense_rows(subject, batch, defect, self.memory_gib)
            else:
                found = self._probe_rows(subject, batch)
            seconds = (time.perf_counter() - started) / len(chunk)
            rows += [replace(r, seconds=seconds) if r.quantity == _NAME else r for r in found]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Means over images with Student intervals; ``stderr_draws`` is the probes' part."""
        return [sample_mean(rows, quantity) for quantity in self.quantities]

    def forward_equivalents(self, network: Outline) -> float:
        """Predicted work per image; probes as trained networks need them."""
        if self._resolved(network.jacobian_rows) == "dense":
            return GRAPH_COST + ROW_COST * network.jacobian_rows
        return predicted_cost(self.max_draws)

    def note(self, network: Outline) -> str:
        """The method that ``auto`` takes, and the memory of one image."""
        dense = self._resolved(network.jacobian_rows) == "dense"
        count = network.jacobian_rows if dense else self.max_draws
        size = int(np.prod(network.data_config["input_size"]))
        what = "exact rows" if dense else "probes at most"
        return f"{count} {what}, {memory_text(count, size)} per image"

    def _resolved(self, rows: int) -> str:
        """``dense`` or ``probes``: a function of the settings and the network's sizes alone."""
        if self.method != "auto":
            return self.method
        return "dense" if rows <= FEW_ROWS else "probes"

    def _probe_rows(self, subject: Subject, batch: Batch) -> list[Row]:
        found = jacobian_moments(
            subject,
            batch,
            metric=_NAME,
            weight=None,
            ratio=True,
            target_relative_stderr=self.target_relative_stderr,
            max_draws=self.max_draws,
        )
        rows: list[Row] = []
        for i, sample in enumerate(batch.samples):
            row = Row(
                quantity=_NAME,
                value=float(found.ratio[i]),
                sample=sample,
                stderr=float(found.ratio_stderr[i]),
                status=probed_status(found.ratio[i], converged=bool(found.converged[i])),
                num_iterations=int(found.num_steps[i]),
                num_probes=int(found.num_probes[i]),
                forward_equivalents=float(found.forward_equivalents[i]),
            )
            norm = float(found.norm_squared[i])
            rows += [
                row,
                replace(
                    row,
                    quantity=_NORM_NAME,
                    value=norm,
                    stderr=float(found.norm_squared_stderr[i]),
                    status=probed_status(norm, converged=norm == 0 or bool(found.converged[i])),
                    forward_equivalents=0.0,
                ),
            ]
        return rows


def _dense_rows(subject: Subject, batch: Batch, defect: float, memory_gib: float) -> list[Row]:
    found = spectra(subject, batch, memory_gib=memory_gib)
    s = found.singular_values[IMAGE]
    with np.errstate(invalid="ignore"):  # J = 0 is 0 / 0: NaN
        squares = (s / s[:, :1]) ** 2  # relative, because fourth powers of 1e-100 underflow
    ratios = squares.sum(1) ** 2 / (squares**2).sum(1)
    norms = (s**2).sum(1)
    # A perturbation of J by a share e changes ||J||_F^2 by at most (1 + e)^2, Tr C^2 by its square.
    up, down = 1 + defect, max(0.0, 1 - defect)
    most = min(s.shape[1], found.num_outputs)
    rows: list[Row] = []
    for sample, ratio, norm in zip(batch.samples, ratios.tolist(), norms.tolist(), strict=True):
        low, high = ratio * (down / up) ** 4, ratio * (up / down) ** 4 if down else float(most)
        row = Row(
            quantity=_NAME,
            value=ratio,
            sample=sample,
            lower=max(low, 1.0),
            upper=min(high, float(most)),
            status=Status.OK if np.isfinite(ratio) else Status.NOT_FINITE,
            num_iterations=found.num_rows,
            forward_equivalents=found.forward_equivalents,
        )
        rows += [
            row,
            replace(
                row,
                quantity=_NORM_NAME,
                value=norm,
                lower=norm * down**2,
                upper=norm * up**2,
                status=Status.OK if np.isfinite(norm) else Status.NOT_FINITE,
                forward_equivalents=0.0,
            ),
        ]
    return rows
