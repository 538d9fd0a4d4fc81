"""Elementwise-adaptive sharpness in the limit of small noise, and what separates it from others.

For the loss of Eq. 1, H its Hessian, z standard normal over all parameters, products elementwise:

    adaptive_sharpness_hessian      = sum_k H_kk theta_k^2                               (Eq. 40)
                                    = E_z (theta z)^T H (theta z)
    adaptive_sharpness_gauss_newton = mean_i sum_k |df(x_i)/dtheta_k|^2 theta_k^2        (Eq. 41)
                                    = mean_i E_z |J_i (theta z)|^2
    adaptive_sharpness_residual     = Eq. 40 - Eq. 41 = mean_i E_z <f_i - y_i, D^2 f_i[theta z]^2>
    adaptive_sharpness_excess       = Eq. 46 at ``rho`` - Eq. 40

in units of the loss. These are three different numbers. Eq. 40 and 41 agree at interpolation, and
everywhere for networks that are piecewise linear in each single parameter; elsewhere they do not,
and Eq. 40 can be negative while Eq. 41 cannot. Eq. 46 is what ``adaptive_sharpness`` measures: a
loss change under noise of finite size, which tends to Eq. 40 as rho -> 0 and differs by O(rho^2).

All come from the same draws. The noise rho theta z of Eq. 46 takes the very z of the second
derivative, with both signs, so that the difference of the two has the variance of what they do not
share. That is why z is normal and not signs, which have the same mean for Eq. 40 and 41 and less
variance, by 2 sum_k (H_kk theta_k^2)^2. That is 11 to 58 % of the variance between draws on
networks of a thousand weights (measured; trained on digits), less with more weights.

Draw r of group g comes from the key (seed, "adaptive_sharpness_limit", g, r).
"""

from __future__ import annotations

import time
from typing import ClassVar, Self

import numpy as np
import pydantic
import torch

from tasks.block import Block
from tasks.directional import DIRECTIONAL_COST, quadratic_forms
from tasks.grouped_stages import (
    COVERAGE_FIELDS,
    check_draws,
    grouped_estimates,
    grouped_stages,
    sample_groups,
    select,
    suffices,
)
from tasks.measurement import Batch, Columns, Estimate, Measurement, Row, Status, Subject
from tasks.outline import Outline
from tasks.perturbation import PerturbableWeights, perturbable
from tasks.random import generator
from tasks.squared_error import squared_errors

_NAME = "adaptive_sharpness_limit"
_HESSIAN = "adaptive_sharpness_hessian"
_COST = DIRECTIONAL_COST + 3  # the unperturbed forward and one for each sign of the noise


class AdaptiveSharpnessLimit(Measurement):
    """Settings of the small-noise limit of adaptive sharpness and its companions.

    Attributes:
        rho: Noise scale relative to each weight of the finite value in the excess. The other
            quantities do not depend on it. In float32, below 0.01, rounding of the loss shows.
        group_size: Images that share a draw. Larger saves drawing, smaller gives more independent
            groups to estimate the error from.
        min_draws: Draws per group to start with. Two are needed to tell draws from images.
        max_draws: Draws per group to end with at the latest.
        max_samples: Images to grow to before draws are added; None keeps the run's ``samples``.
        target_relative_stderr: Standard error over absolute value of
            ``adaptive_sharpness_hessian`` at which to stop.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (
        _HESSIAN,
        "adaptive_sharpness_gauss_newton",
        "adaptive_sharpness_residual",
        "adaptive_sharpness_excess",
    )
    needs_labels: ClassVar[bool] = True
    coverage_fields: ClassVar[frozenset[str]] = COVERAGE_FIELDS

    rho: float = pydantic.Field(default=0.1, gt=0)
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
        """Double the samples up to ``max_samples``, then the draws up to ``max_draws``.

        Raises:
            ValueError: If ``max_samples`` is below ``num_samples``.
        """
        return grouped_stages(self, num_samples, available)

    def finished(self, rows: Columns) -> bool:
        """Whether Eq. 40 has its target, or further stages could not bring it nearer."""
        return suffices(self, select(rows, _HESSIAN))

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Measure draws on samples, group by group.

        Returns:
            Four rows for each image and draw; work and time are on the first, the loss changes (of
            the summed squared error) on that of the excess. An overflow gives NaN and status
            ``NOT_FINITE``.

        Raises:
            MeasurementError: If the unperturbed network gives NaN or infinity for an image, or
                cannot be differentiated often enough.
        """
        rows: list[Row] = []
        with perturbable(subject.model) as weights:
            for group, members in sample_groups(block.samples, self.group_size):
                batch = subject.batch(members)
                for draw in block.draws:
                    rows += self._draw(subject, weights, batch, group=group, draw=draw)
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Reduce to the means over images and draws, with both errors.

        ``stderr`` contains the spread of images and draws, ``stderr_draws`` that of draws alone.
        All come from the same draws and share the status of Eq. 40.
        """
        return grouped_estimates(self, rows, self.quantities)

    def forward_equivalents(self, network: Outline) -> float:
        """Forwards of one image and draw."""
        return _COST

    def _draw(
        self, subject: Subject, weights: PerturbableWeights, batch: Batch, *, group: int, draw: int
    ) -> list[Row]:
        """The rows of one weight draw on one group of images."""
        started = time.perf_counter()
        weights.draw(generator(subject.seed, _NAME, group, draw, device=weights.noise.device))
        direction = _direction(subject.model, weights)
        forms = quadratic_forms(subject, batch, direction)
        base = squared_errors(subject, batch)
        weights.perturb(self.rho)
        plus = squared_errors(subject, batch) - base
        weights.perturb(-self.rho)
        minus = squared_errors(subject, batch) - base
        with np.errstate(invalid="ignore", over="ignore"):
            hessian = forms.gauss_newton + forms.residual
            excess = (plus + minus) / (2 * self.rho**2) - hessian
        columns = (hessian, forms.gauss_newton, forms.residual, excess)
        finite = [np.isfinite(column) for column in columns]
        seconds = (time.perf_counter() - started) / len(batch.samples)
        return [
            Row(
                quantity=quantity,
                value=float(columns[k][i]) if finite[k][i] else float("nan"),
                sample=sample,
                draw=draw,
                group=group,
                loss_change_plus=float(plus[i]) if k == 3 else None,
                loss_change_minus=float(minus[i]) if k == 3 else None,
                status=Status.OK if finite[k][i] else Status.NOT_FINITE,
                num_probes=1,
                forward_equivalents=_COST if k == 0 else 0.0,
                seconds=seconds if k == 0 else 0.0,
            )
            for i, sample in enumerate(batch.samples)
            for k, quantity in enumerate(self.quantities)
        ]


def _direction(model: torch.nn.Module, weights: PerturbableWeights) -> dict[str, torch.Tensor]:
    """The draw's theta z as a tensor for every parameter; the weights are theta afterwards."""
    noise = weights.noise.to(weights.original.dtype)
    torch.mul(weights.original, noise, out=weights.current)
    direction = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weights.restore()
    return direction
