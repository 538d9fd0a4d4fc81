"""Mean of a per-image quantity over the images, for measurements without random weight draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.stats

from tasks.measurement import Columns, Estimate, Status


def sample_mean(rows: Columns, quantity: str) -> Estimate:
    """Mean of one quantity over the images with its standard error and 95 % Student interval.

    Args:
        rows: Columns with one row per image for this quantity, in any order.
        quantity: Which rows to take.

    Returns:
        Estimate in units of the quantity, the same bytes for every order of the rows. A NaN row
        makes it NaN with status ``not_finite``; a single image has no standard error (NaN). Where
        rows have a standard error of their own (random probes), ``stderr_draws`` is what these
        amount to in the mean; else NaN.

    Raises:
        ValueError: If there is no row of this quantity.
    """
    chosen = np.flatnonzero(np.asarray(rows["quantity"]) == quantity)
    if not len(chosen):
        raise ValueError(f"no rows of {quantity!r} to summarize: measure it first")
    chosen = chosen[np.argsort(np.asarray(rows["sample"])[chosen].astype(np.int64), kind="stable")]

    def column(name: str) -> np.ndarray:
        return np.asarray(rows[name])[chosen].astype(np.float64)

    values, errors = column("value"), column("stderr")
    count = len(values)
    mean = float(np.mean(values))
    stderr, half = student(values)
    with np.errstate(invalid="ignore"):
        error_bound = float(np.mean(column("upper") - column("lower")) / 2)
    statuses = set(np.asarray(rows["status"])[chosen].astype(str))
    order = (
        Status.NOT_FINITE, Status.NOT_CONVERGED, Status.UNCLEAR_RANK, Status.CONSTANT_INPUT,
        Status.TARGET_NOT_REACHED,
    )  # fmt: skip
    return Estimate(
        quantity=quantity,
        value=mean,
        stderr=stderr,
        ci_low=mean - half,
        ci_high=mean + half,
        num_samples=count,
        num_rows=count,
        stderr_draws=np.nan if np.isnan(errors).any() else float(np.linalg.norm(errors) / count),
        error_bound=error_bound,
        num_probes=int(column("num_probes").sum()),
        forward_equivalents=float(column("forward_equivalents").sum()),
        status=next((status for status in order if status.value in statuses), Status.OK),
    )


def student(values: np.ndarray) -> tuple[float, float]:
    """Standard error of the mean of (n,) values, and half their 95 % Student interval.

    Both NaN for a single value, and where values are infinite (logarithms of 0 have no spread).
    """
    count = len(values)
    if count < 2:
        return float("nan"), float("nan")
    with np.errstate(invalid="ignore", over="ignore"):
        stderr = float(np.std(values, ddof=1) / np.sqrt(count))
    return stderr, float(scipy.stats.t.ppf(0.975, count - 1)) * stderr


def layer_means(rows: Columns, quantity: str) -> list[Estimate]:
    """``sample_mean`` of a layer-wise quantity, layer by layer in the order of the first image.

    Args:
        rows: Columns with one row per image and layer for this quantity.
        quantity: Which rows to take.
    """
    parts = rows_by_layer(rows, quantity)
    return [replace(sample_mean(part, quantity), layer=layer) for layer, part in parts.items()]


def rows_by_layer(rows: Columns, quantity: str) -> dict[str, Columns]:
    """The rows of a layer-wise quantity, by layer in the order of the image that comes first."""
    chosen = np.flatnonzero(np.asarray(rows["quantity"]) == quantity)
    chosen = chosen[np.argsort(np.asarray(rows["sample"])[chosen].astype(np.int64), kind="stable")]
    layers = np.asarray(rows["layer"])[chosen].astype(str)
    return {
        layer: {name: np.asarray(column)[chosen[layers == layer]] for name, column in rows.items()}
        for layer in dict.fromkeys(layers.tolist())
    }
