"""Estimates that are smooth functions of means over images, with errors by linearisation.

For theta = g(mean_i v_i) the contribution of image i to the error is g'(mean) . (v_i - mean) / n
(delta method), so the standard error is that of a mean of such contributions.
"""

from __future__ import annotations

import math

import numpy as np

from tasks.measurement import Estimate, Status
from tasks.sample_mean import student


def linearised(
    quantity: str,
    value: float,
    influence: np.ndarray,
    *,
    error_bound: float = math.nan,
    stderr_draws: float = math.nan,
    num_rows: int = 0,
    num_probes: int = 0,
    status: Status = Status.OK,
) -> Estimate:
    """Estimate from its value and the images' influence on it.

    Args:
        quantity: Name of the estimate.
        value: g(mean).
        influence: (n,) derivative of g at the mean times the deviation of each image, any order.
        error_bound: Half width of the certificate, as in ``Estimate``.
        stderr_draws: Part of the standard error that random draws make, as in ``Estimate``.
        num_rows: Rows behind it.
        num_probes: Random vectors behind it.
        status: ``not_finite`` takes its place if the value is not finite.

    Returns:
        Estimate with a Student interval (95 %); no standard error for a single image.
    """
    stderr, half = student(np.sort(influence))
    return Estimate(
        quantity=quantity,
        value=value,
        stderr=stderr,
        ci_low=value - half,
        ci_high=value + half,
        num_samples=len(influence),
        num_rows=num_rows,
        stderr_draws=stderr_draws,
        error_bound=error_bound,
        num_probes=num_probes,
        status=status if math.isfinite(value) or status is not Status.OK else Status.NOT_FINITE,
    )
