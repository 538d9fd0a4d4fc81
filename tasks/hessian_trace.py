"""Trace of the loss Hessian (Eq. 2) by Hutchinson's estimator, and its distance from Eq. 3.

For the loss of Eq. 1 and directions v of independent random signs,

    hessian_trace          = Tr H = mean_i E_v [v^T H_i v]                   units of the loss
    hessian_trace_residual = mean_i E_v <f_i - y_i, D^2 f_i[v, v]>
                           = Tr H - mean_i |grad_theta f(x_i)|_F^2

both from the same probes. The second is what Eq. 3 neglects: it is zero at interpolation, and
everywhere for networks that are piecewise linear in each single parameter (ReLU without
normalisation layers, identity outputs), but a single probe of it is not. It may have either sign.
Eq. 3 itself is not computed here.

The Hessian is that of all parameters together, so cross terms between parameters are noise:
the variance of a probe is 2 (|H|_F^2 - sum_k H_kk^2) with the images held fixed. Probe r of group g
comes from the key (seed, "hessian_trace", g, r).
"""

from __future__ import annotations

import time
from typing import ClassVar, Self

import numpy as np
import pydantic
import torch

from tasks.block import Block
from tasks.directional import DIRECTIONAL_COST, QuadraticForms, quadratic_forms
from tasks.grouped_stages import (
    COVERAGE_FIELDS,
    check_draws,
    grouped_estimates,
    grouped_stages,
    sample_groups,
    select,
    suffices,
)
from tasks.measurement import Columns, Estimate, Measurement, Row, Status, Subject
from tasks.outline import Outline
from tasks.random import generator

_NAME = "hessian_trace"


class HessianTrace(Measurement):
    """Settings of the Hessian's trace.

    Attributes:
        group_size: Images that share a probe. Larger saves drawing, smaller gives more independent
            groups to estimate the error from.
        min_draws: Probes per group to start with. Two are needed to tell probes from images.
        max_draws: Probes per group to end with at the latest.
        max_samples: Images to grow to before probes are added; None keeps the run's ``samples``.
        target_relative_stderr: Standard error over absolute value of ``hessian_trace`` at which to
            stop.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (_NAME, "hessian_trace_residual")
    needs_labels: ClassVar[bool] = True
    coverage_fields: ClassVar[frozenset[str]] = COVERAGE_FIELDS

    group_size: int = pydantic.Field(default=8, ge=1)
    min_draws: int = pydantic.Field(default=2, ge=1)
    max_draws: int = pydantic.Field(default=32, ge=1)
    max_samples: int | None = pydantic.Field(default=None, ge=1)
    target_relative_stderr: float = pydantic.Field(default=0.05, gt=0)

    @pydantic.model_validator(mode="after")
    def _check_draws(self) -> Self:
        check_draws(self)
        return self

    @property
    def alignment(self) -> int:
        """Groups stay whole, so that a group's images always share one batch."""
        return self.group_size

    def stages(self, num_samples: int, available: int) -> list[Block]:
        """Double the samples up to ``max_samples``, then the probes up to ``max_draws``.

        Raises:
            ValueError: If ``max_samples`` is below ``num_samples``.
        """
        return grouped_stages(self, num_samples, available)

    def finished(self, rows: Columns) -> bool:
        """Whether ``hessian_trace`` has its target, or further stages could not bring it nearer."""
        return suffices(self, select(rows, _NAME))

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Measure probes on samples, group by group.

        Returns:
            Two rows for each image and probe; work and time are on the first. An overflow gives
            NaN and status ``NOT_FINITE``.

        Raises:
            MeasurementError: If the network gives NaN or infinity for an image, or cannot be
                differentiated often enough.
        """
        rows: list[Row] = []
        for group, members in sample_groups(block.samples, self.group_size):
            batch = subject.batch(members)
            for draw in block.draws:
                started = time.perf_counter()
                signs = _signs(subject, group, draw)
                forms = quadratic_forms(subject, batch, signs)
                seconds = (time.perf_counter() - started) / len(members)
                rows += _rows(forms, batch.samples, group=group, draw=draw, seconds=seconds)
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Reduce to the means over images and probes, with both errors.

        ``stderr`` contains the spread of images and probes, ``stderr_draws`` that of probes alone.
        The residual comes from the same probes and shares the status of the trace.
        """
        return grouped_estimates(self, rows, self.quantities)

    def forward_equivalents(self, network: Outline) -> float:
        """Forwards of one image and probe."""
        return DIRECTIONAL_COST


def _signs(subject: Subject, group: int, draw: int) -> dict[str, torch.Tensor]:
    """Random signs for every parameter, the same whatever the network's dtype."""
    parameters = dict(subject.model.named_parameters())
    device = next(iter(parameters.values())).device if parameters else "cpu"
    source = generator(subject.seed, _NAME, group, draw, device=device)
    return {
        name: torch.randint(
            0, 2, parameter.shape, generator=source, dtype=torch.int8, device=parameter.device
        )
        .to(parameter.dtype)
        .mul_(2)
        .sub_(1)
        for name, parameter in parameters.items()
    }


def _rows(
    forms: QuadraticForms, samples: tuple[int, ...], *, group: int, draw: int, seconds: float
) -> list[Row]:
    """The pair of rows of every image under one probe."""
    with np.errstate(invalid="ignore", over="ignore"):
        values = {_NAME: forms.gauss_newton + forms.residual}
    values["hessian_trace_residual"] = forms.residual
    return [
        Row(
            quantity=quantity,
            value=float(value) if np.isfinite(value) else float("nan"),
            sample=sample,
            draw=draw,
            group=group,
            status=Status.OK if np.isfinite(value) else Status.NOT_FINITE,
            num_probes=1,
            forward_equivalents=DIRECTIONAL_COST if quantity == _NAME else 0.0,
            seconds=seconds if quantity == _NAME else 0.0,
        )
        for i, sample in enumerate(samples)
        for quantity, value in ((name, column[i]) for name, column in values.items())
    ]
