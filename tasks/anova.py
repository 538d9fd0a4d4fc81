"""Mean over images and random draws, with standard errors that know both.

Groups of images share their draws: value v[g, i, r] of image i of group g under draw r is

    v = mean + image effect + draw effect + residual,

images and draws random and independent between groups. Sums over groups are therefore independent
and their spread contains all three components, so the standard error of the mean is the cluster
standard error; with the images held fixed only the spread between a group's draws remains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.stats


@dataclass(frozen=True, slots=True)
class GroupedMean:
    """Mean with its errors; ``stderr_draws`` is the part that vanishes with more draws."""

    value: float
    stderr: float
    stderr_draws: float
    ci_low: float
    ci_high: float
    num_samples: int
    num_groups: int


class VarianceComponents(NamedTuple):
    """Variances between images, between draws, and of their interaction.

    Unbiased, hence possibly negative. With one image per group the draw effect is part of the
    residual and ``draw`` is NaN.
    """

    image: float
    draw: float
    residual: float


class _Table(NamedTuple):
    image_means: np.ndarray  # (I,)
    image_groups: np.ndarray  # (I,)
    sizes: np.ndarray  # (G,) images per group
    cell_means: np.ndarray  # (C,) mean over the images of one (group, draw)
    cell_groups: np.ndarray  # (C,)
    draws: np.ndarray  # (G,) draws per group


def grouped_mean(
    values: np.ndarray,
    *,
    samples: np.ndarray,
    draws: np.ndarray,
    groups: np.ndarray,
    confidence: float = 0.95,
) -> GroupedMean:
    """Estimate the population mean from values of (image, draw) pairs in any order.

    Args:
        values: (R,) one value for each (image, draw).
        samples: (R,) image numbers.
        draws: (R,) draw numbers; draws of different groups are unrelated.
        groups: (R,) group numbers of the images.
        confidence: Coverage of the interval.

    Returns:
        The mean of the image means. ``stderr`` in ratio form, so that an incomplete last group
        has its proper weight; NaN with fewer than two groups. ``stderr_draws`` NaN unless every
        group has two draws. All NaN if a value is not finite.
    """
    table = _table(values, samples, draws, groups)
    num_images, num_groups = len(table.image_means), len(table.sizes)
    mean = float(table.image_means.sum() / num_images)
    sums = np.bincount(table.image_groups, table.image_means, num_groups)
    deviations = sums - mean * table.sizes
    stderr = low = high = float("nan")
    if num_groups >= 2:
        factor = num_groups / (num_groups - 1)
        stderr = float(np.sqrt(factor * np.square(deviations).sum()) / num_images)
        half = stderr * float(scipy.stats.t.ppf((1 + confidence) / 2, num_groups - 1))
        low, high = mean - half, mean + half
    return GroupedMean(
        mean, stderr, _stderr_draws(table) / num_images, low, high, num_images, num_groups
    )


def _stderr_draws(table: _Table) -> float:
    if table.draws.min() < 2:
        return float("nan")
    centres = np.bincount(table.cell_groups, table.cell_means) / table.draws
    squares = np.square(table.cell_means - centres[table.cell_groups])
    variances = np.bincount(table.cell_groups, squares) / (table.draws - 1) / table.draws
    return float(np.sqrt((np.square(table.sizes) * variances).sum()))


def _table(
    values: np.ndarray, samples: np.ndarray, draws: np.ndarray, groups: np.ndarray
) -> _Table:
    # Sorted first: sums of floats depend on their order, the result must not.
    order = np.lexsort((draws, samples))
    values, samples, draws, groups = (a[order] for a in (values, samples, draws, groups))
    _, first, images, per_image = np.unique(
        samples, return_index=True, return_inverse=True, return_counts=True
    )
    _, group_of_row = np.unique(groups, return_inverse=True)
    image_groups = group_of_row[first]
    cells, cell_of_row, per_cell = np.unique(
        np.stack([group_of_row, draws.astype(np.int64)], axis=1),
        axis=0,
        return_inverse=True,
        return_counts=True,
    )
    cell_groups = cells[:, 0]
    return _Table(
        image_means=np.bincount(images, values) / per_image,
        image_groups=image_groups,
        sizes=np.bincount(image_groups),
        cell_means=np.bincount(cell_of_row.reshape(-1), values) / per_cell,
        cell_groups=cell_groups,
        draws=np.bincount(cell_groups),
    )
