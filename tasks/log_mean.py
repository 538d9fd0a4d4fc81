"""Logarithm of the mean over images of a quantity that is known by its logarithm.

Volumes of Jacobians are products of hundreds of singular values, so neither they nor their mean fit
a float64; the mean is taken relative to the largest.
"""

from __future__ import annotations

import numpy as np
import scipy.special

from tasks.measurement import Columns, Estimate
from tasks.sample_mean import sample_mean, student


def log_mean(rows: Columns, quantity: str, *, name: str) -> Estimate:
    """log((1/n) sum_i exp(L_i)) of rows L_i, with its error by the delta method.

    The standard error is that of the mean relative to the mean. It is a first-order error: where a
    few images make up the mean (relative error above a third) value and interval are rough, and the
    value tends to be too small.

    Args:
        rows: Columns with one row per image for this quantity, in any order; -inf is a zero.
        quantity: Which rows to take.
        name: Quantity of the estimate.

    Returns:
        Estimate with a Student interval (95 %) on the logarithmic scale; ``error_bound`` is half
        the distance of the log-means of the rows' lower and upper ends.
    """
    plain = sample_mean(rows, quantity)  # counts, costs and status
    chosen = np.asarray(rows["quantity"]) == quantity
    value, lower, upper = (
        np.sort(np.asarray(rows[column])[chosen].astype(np.float64))
        for column in ("value", "lower", "upper")
    )
    count = len(value)
    result, stderr, half = _log_mean(value), float("nan"), float("nan")
    if np.isfinite(result):
        stderr, half = student(np.exp(value - result))  # in units of the mean
    with np.errstate(invalid="ignore"):
        error = (_log_mean(upper) - _log_mean(lower)) / 2
    return Estimate(
        quantity=name,
        value=result,
        stderr=stderr,
        ci_low=result - half,
        ci_high=result + half,
        num_samples=count,
        num_rows=count,
        error_bound=error,
        num_probes=plain.num_probes,
        forward_equivalents=plain.forward_equivalents,
        status=plain.status,
    )


def log_sum(values: np.ndarray) -> float:
    """log(sum exp(values)); -inf where all are -inf, NaN where one is."""
    if np.isnan(values).any():
        return float("nan")
    return float(scipy.special.logsumexp(values))


def _log_mean(values: np.ndarray) -> float:
    return log_sum(values) - float(np.log(len(values)))
