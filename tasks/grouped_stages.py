"""Sequential stopping of measurements whose images share random draws in groups.

Images and draws are fresh per group, so few draws on many images serve the population mean best:
stages first grow the images, then the draws. All functions take the measurement's settings, which
must have the fields of ``DrawSettings``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import numpy as np

from tasks.anova import GroupedMean, Table, grouped_mean
from tasks.block import Block
from tasks.measurement import Columns, Estimate, Status

# Fields that say how many draws and images are wanted but cannot change any row.
COVERAGE_FIELDS = frozenset({"min_draws", "max_draws", "max_samples", "target_relative_stderr"})

# Share of draws in the variance below which more draws shorten the interval by < 5 %.
_SMALL_SHARE = 0.10
# Fewer groups give too uncertain a standard error to stop on. Measured on the skewed values of a
# digits ViT (rho 0.03, target 10 %): stopping from 8, 32, 64 groups on covers 90, 92, 93.5 %.
_MIN_GROUPS = 64


class DrawSettings(Protocol):
    """What a measurement with grouped draws has to say about its budget and its aim."""

    metric: ClassVar[str]

    @property
    def min_draws(self) -> int:
        """Draws per group to start with."""
        ...

    @property
    def max_draws(self) -> int:
        """Draws per group to end with at the latest."""
        ...

    @property
    def max_samples(self) -> int | None:
        """Images to grow to before draws are added; None keeps the run's ``samples``."""
        ...

    @property
    def target_relative_stderr(self) -> float:
        """Standard error over absolute value at which to stop."""
        ...


def check_draws(settings: DrawSettings) -> None:
    """Refuse an impossible budget.

    Raises:
        ValueError: If ``max_draws`` is below ``min_draws``.
    """
    if settings.max_draws < settings.min_draws:
        raise ValueError(
            f"max_draws = {settings.max_draws} is below min_draws = {settings.min_draws}. "
            "Raise max_draws or lower min_draws."
        )


def grouped_stages(settings: DrawSettings, num_samples: int, available: int) -> list[Block]:
    """Double the samples up to ``max_samples``, then the draws up to ``max_draws``.

    Raises:
        ValueError: If ``max_samples`` is below ``num_samples``.
    """
    most = num_samples if settings.max_samples is None else settings.max_samples
    if most < num_samples:
        raise ValueError(
            f"{settings.metric}: max_samples = {most} is below samples = {num_samples}. "
            "Raise max_samples or remove it."
        )
    most = min(most, available)
    samples = _doublings(min(num_samples, most), most)
    draws = _doublings(settings.min_draws, settings.max_draws)
    stages = [Block(range(count), range(settings.min_draws)) for count in samples]
    return stages + [Block(range(most), range(count)) for count in draws[1:]]


def suffices(settings: DrawSettings, table: Table) -> bool:
    """Whether the target is reached, or further stages could not bring the mean nearer to it."""
    if not np.isfinite(table.values).all():
        return True
    mean = grouped_mean(table)
    # Draws are added last: more than min_draws of them means that the images are exhausted.
    images_may_grow = (
        settings.max_samples is not None
        and mean.num_samples < settings.max_samples
        and int(table.draws.max()) + 1 <= settings.min_draws
    )
    if mean.relative_stderr <= settings.target_relative_stderr:
        return mean.num_groups >= _MIN_GROUPS or not images_may_grow
    return mean.draws_share <= _SMALL_SHARE and not images_may_grow


def grouped_status(settings: DrawSettings, mean: GroupedMean) -> Status:
    """How a mean stands to its target, and what limits it."""
    if not np.isfinite(mean.value):
        return Status.NOT_FINITE
    if mean.relative_stderr <= settings.target_relative_stderr:
        return Status.OK
    if mean.num_groups < 2 or mean.draws_share <= _SMALL_SHARE:
        return Status.LIMITED_BY_SAMPLES
    return Status.TARGET_NOT_REACHED


def grouped_estimate(
    quantity: str, mean: GroupedMean, *, num_rows: int, forward_equivalents: float, status: Status
) -> Estimate:
    """A mean over images and draws as the estimate of a quantity."""
    return Estimate(
        quantity=quantity,
        value=mean.value,
        stderr=mean.stderr,
        ci_low=mean.ci_low,
        ci_high=mean.ci_high,
        num_samples=mean.num_samples,
        num_rows=num_rows,
        stderr_draws=mean.stderr_draws,
        num_probes=mean.num_draws,
        forward_equivalents=forward_equivalents,
        status=status,
    )


def grouped_estimates(
    settings: DrawSettings, rows: Columns, quantities: Sequence[str]
) -> list[Estimate]:
    """Estimates of quantities that come from the same draws, the first of which has the target.

    The others share its status, unless they themselves are not finite: a target relative to a
    difference that may vanish would mean nothing.
    """
    quantity_of_row = np.asarray(rows["quantity"])
    work = np.asarray(rows["forward_equivalents"]).astype(np.float64)
    estimates: list[Estimate] = []
    for quantity in quantities:
        table = select(rows, quantity)
        mean = grouped_mean(table)
        shared = estimates[0].status if estimates else grouped_status(settings, mean)
        estimates.append(
            grouped_estimate(
                quantity,
                mean,
                num_rows=len(table.values),
                forward_equivalents=float(np.sort(work[quantity_of_row == quantity]).sum()),
                status=shared if np.isfinite(mean.value) else Status.NOT_FINITE,
            )
        )
    return estimates


def select(rows: Columns, quantity: str) -> Table:
    """The rows of one quantity as a table of values by image and draw."""
    chosen = np.asarray(rows["quantity"]) == quantity
    return Table(
        np.asarray(rows["value"])[chosen].astype(np.float64),
        *(np.asarray(rows[name])[chosen].astype(np.int64) for name in ("sample", "draw", "group")),
    )


def sample_groups(samples: range, group_size: int) -> Iterator[tuple[int, range]]:
    """The groups that a range of samples touches, each with its samples in that range."""
    for group in range(samples.start // group_size, (samples.stop - 1) // group_size + 1):
        start = max(samples.start, group * group_size)
        yield group, range(start, min(samples.stop, (group + 1) * group_size))


def _doublings(first: int, last: int) -> list[int]:
    counts = [first]
    while counts[-1] < last:
        counts.append(min(2 * counts[-1], last))
    return counts
