"""Mean over images and random draws, with standard errors that know both.

Groups of images share their draws: value v[g, i, r] of image i of group g under draw r is

    v = mean + image effect + draw effect + residual,

images and draws random and independent between groups. Sums over groups are therefore independent
and their spread contains all three components, so the standard error of the mean is the cluster
standard error; with the images held fixed only the spread between a group's draws remains.

The values are skewed: a few images carry much of the mean. Student's interval then ends too low
too often, and the interval that corrects for skewness (Hall, J. R. Stat. Soc. B 54, 1992) is too
short where the sample happens not to show it. On each side the further of the two is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.stats


class Table(NamedTuple):
    """Values of (image, draw) pairs in any order, each column (R,).

    Draws of different groups are unrelated. Within a group all images have the same draws.
    """

    values: np.ndarray
    samples: np.ndarray
    draws: np.ndarray
    groups: np.ndarray


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
    num_draws: int  # distinct (group, draw) pairs

    @property
    def relative_stderr(self) -> float:
        """Standard error over absolute value; infinite for value 0."""
        return self.stderr / abs(self.value) if self.value else float("inf")

    @property
    def draws_share(self) -> float:
        """Share of the variance of the mean that is due to draws."""
        return (self.stderr_draws / self.stderr) ** 2 if self.stderr else 0.0


class VarianceComponents(NamedTuple):
    """Variances between images, between draws, and of their interaction, of a single value.

    Unbiased, hence possibly negative. NaN where the table cannot tell: with one image in every
    group the draw effect is part of ``residual`` and ``draw`` is NaN; with one draw all are.
    """

    image: float
    draw: float
    residual: float


def grouped_mean(table: Table, *, confidence: float = 0.95) -> GroupedMean:
    """Estimate the population mean.

    Args:
        table: At least one value.
        confidence: Coverage of the interval.

    Returns:
        The mean of the image means, the same for every order of the table. ``stderr`` in ratio
        form, so that an incomplete last group has its proper weight; NaN with fewer than two
        groups. ``stderr_draws`` NaN unless every group has two draws. All NaN if a value is.
    """
    means = _means(table)
    num_images, num_groups = len(means.images), len(means.sizes)
    value = float(means.images.sum() / num_images)
    sums = np.bincount(means.group_of_image, means.images)
    deviations = sums - value * means.sizes
    stderr = below = above = float("nan")
    if num_groups >= 2:
        variance = np.square(deviations).sum() * num_groups / (num_groups - 1)
        stderr = float(np.sqrt(variance)) / num_images
        below, above = _reaches(deviations, confidence)
    return GroupedMean(
        value=value,
        stderr=stderr,
        stderr_draws=_stderr_draws(means),
        ci_low=value - below * stderr,
        ci_high=value + above * stderr,
        num_samples=num_images,
        num_groups=num_groups,
        num_draws=len(means.cells),
    )


def _reaches(deviations: np.ndarray, confidence: float) -> tuple[float, float]:
    """How many standard errors the interval reaches below and above the mean."""
    count = len(deviations)
    student = float(scipy.stats.t.ppf((1 + confidence) / 2, count - 1))
    scale = float(np.sqrt(np.square(deviations).sum() / (count - 1)))
    if count < 3 or scale == 0:
        return student, student
    third = float((deviations**3).sum()) * count / ((count - 1) * (count - 2))
    skewness = third / scale**3 / count**0.5

    def hall(t: float) -> float:
        # Inverse of t + skewness t^2 / 3 + skewness^2 t^3 / 27 + skewness / 6.
        if abs(skewness) < 1e-6:  # the limit, without cancellation
            return t
        return 3 / skewness * (float(np.cbrt(1 + skewness * (t - skewness / 6))) - 1)

    return max(student, hall(student)), max(student, -hall(-student))


def variance_components(table: Table) -> VarianceComponents:
    """Split the variance by a two-way analysis of variance within groups, pooled over groups.

    Solves E[MS_residual] = s_e, E[MS_draw] = s_e + n s_d, E[MS_image] = s_e + D s_i with n images
    and D draws a group. With one image per group the image variance comes from between groups.
    """
    nan = float("nan")
    means = _means(table)
    if means.draws.min() < 2:
        return VarianceComponents(nan, nan, nan)
    by_image = means.images[means.image_of_row]
    if means.sizes.max() == 1:
        squares = np.square(means.values - by_image).sum()
        residual = float(squares / (means.draws - 1).sum())
        between = float(means.images.var(ddof=1)) if len(means.images) > 1 else nan
        return VarianceComponents(
            between - residual * float((1 / means.draws).mean()), nan, residual
        )
    centre = np.bincount(means.group_of_cell, means.cells) / means.draws
    group_of_row = means.group_of_cell[means.cell_of_row]
    rest = means.values - by_image - means.cells[means.cell_of_row] + centre[group_of_row]
    image_dof, draw_dof = means.sizes - 1, means.draws - 1
    residual = float(np.square(rest).sum() / (image_dof * draw_dof).sum())
    draw_squares = np.square(means.cells - centre[means.group_of_cell])
    draw_squares = (draw_squares * means.sizes[means.group_of_cell]).sum()
    image_squares = np.square(means.images - centre[means.group_of_image])
    image_squares = (image_squares * means.draws[means.group_of_image]).sum()
    return VarianceComponents(
        image=float((image_squares - residual * image_dof.sum()) / (image_dof * means.draws).sum()),
        draw=float((draw_squares - residual * draw_dof.sum()) / (draw_dof * means.sizes).sum()),
        residual=residual,
    )


class _Means(NamedTuple):
    """Marginal means. A cell is a (group, draw) pair; R rows, I images, C cells, G groups."""

    values: np.ndarray  # (R,) sorted by image and draw
    image_of_row: np.ndarray  # (R,)
    cell_of_row: np.ndarray  # (R,)
    images: np.ndarray  # (I,) means over draws
    group_of_image: np.ndarray  # (I,)
    sizes: np.ndarray  # (G,) images per group
    cells: np.ndarray  # (C,) means over images
    group_of_cell: np.ndarray  # (C,)
    draws: np.ndarray  # (G,) draws per group


def _means(table: Table) -> _Means:
    # Sorted first: sums of floats depend on their order, the result must not.
    order = np.lexsort((table.draws, table.samples))
    values, samples, draws, groups = (column[order] for column in table)
    _, first, image_of_row, per_image = np.unique(
        samples, return_index=True, return_inverse=True, return_counts=True
    )
    _, group_of_row = np.unique(groups, return_inverse=True)
    span = int(draws.max()) + 1
    cells, cell_of_row, per_cell = np.unique(
        group_of_row * span + draws, return_inverse=True, return_counts=True
    )
    return _Means(
        values=values,
        image_of_row=image_of_row,
        cell_of_row=cell_of_row,
        images=np.bincount(image_of_row, values) / per_image,
        group_of_image=group_of_row[first],
        sizes=np.bincount(group_of_row[first]),
        cells=np.bincount(cell_of_row, values) / per_cell,
        group_of_cell=cells // span,
        draws=np.bincount(cells // span),
    )


def _stderr_draws(means: _Means) -> float:
    if means.draws.min() < 2:
        return float("nan")
    centre = np.bincount(means.group_of_cell, means.cells) / means.draws
    squares = np.square(means.cells - centre[means.group_of_cell])
    variances = np.bincount(means.group_of_cell, squares) / (means.draws - 1) / means.draws
    return float(np.sqrt((np.square(means.sizes) * variances).sum())) / len(means.images)
