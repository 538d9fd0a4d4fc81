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

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from tasks.jacobian_moments import (
    jacobian_moments,
    probed_status,
)
from tasks.layer_rows import IMAGE
from tasks.measurement import Batch, Row, Status, Subject
from tasks.rows_or_probes import RowsOrProbes
from tasks.spectra import spectra

_NAME = "local_dimensionality"
_NORM_NAME = "jacobian_norm_squared"


class LocalDimensionality(RowsOrProbes):
    """Settings of the participation ratio and the Frobenius norm of the input Jacobian.

    Attributes:
        method: ``dense`` computes the rows that span J, exact up to rounding. ``probes`` samples
            and has an error per image. ``auto`` takes ``dense`` for up to 64 rows (outputs, or
            features of the linear head if fewer), where it costs no more.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (_NAME, _NORM_NAME)

    method: Literal["auto", "dense", "probes"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]

    def exact_rows(self, subject: Subject, batch: Batch, defect: float) -> list[Row]:
        """From all rows, with intervals for their rounding."""
        return _dense_rows(subject, batch, defect, self.memory_gib)

    def probe_rows(self, subject: Subject, batch: Batch, defect: float) -> list[Row]:
        """With a standard error per image."""
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
