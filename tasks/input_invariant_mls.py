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
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch

from tasks.finite import checked_jacobian
from tasks.jacobian import DOUBLE_GRAPH_COST, JVP_COST
from tasks.jacobian_moments import (
    jacobian_moments,
    probed_status,
)
from tasks.layer_rows import (
    IMAGE,
    plan_rows,
    reduce_rows,
)
from tasks.measurement import Batch, Row, Status, Subject
from tasks.rows_or_probes import RowsOrProbes

_NAME = "input_invariant_mls"
_AUTHORS_NAME = "input_invariant_mls_jvp_x"


class InputInvariantMls(RowsOrProbes):
    """Settings of the input-invariant sensitivity.

    Attributes:
        method: ``exact`` computes the rows that span J. ``hutchinson`` samples and has an error
            per image. ``auto`` takes ``exact`` for up to 64 rows (outputs, or features of the
            linear head if fewer), where it costs no more.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (_NAME, _AUTHORS_NAME)
    probe_overhead: ClassVar[float] = DOUBLE_GRAPH_COST + JVP_COST  # one product: the authors' form

    method: Literal["auto", "exact", "hutchinson"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]

    def exact_rows(self, subject: Subject, batch: Batch, defect: float) -> list[Row]:
        """From all rows, with intervals for their rounding."""
        return _exact_rows(subject, batch, defect, self.memory_gib)

    def probe_rows(self, subject: Subject, batch: Batch, defect: float) -> list[Row]:
        """With a standard error per image."""
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
                    forward_equivalents=float(found.forward_equivalents[i]) + self.probe_overhead,
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
