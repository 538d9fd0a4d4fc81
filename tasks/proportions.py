"""Confidence intervals of shares and of their differences, sound when all or none are successes.

Student's interval of 100 right answers out of 100 has no width, although the true share may well be
97 %. Wilson's score interval (J. Am. Stat. Assoc. 22, 1927) does not break there, and Newcombe's
hybrid of two of them (method 10 of Stat. Med. 17:873, 1998) is its counterpart for a difference.
"""

from __future__ import annotations

import math

import scipy.stats

_Z = float(scipy.stats.norm.ppf(0.975))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a probability.

    Args:
        share: Successes over ``count``, in [0, 1].
        count: Independent trials, at least 1.

    Returns:
        Lower and upper end, in [0, 1].
    """
    weight = _Z**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # Rounding must not push an end past a share of 0 or 1, which the interval touches.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def newcombe_interval(
    first: float, second: float, *, count_first: int, count_second: int
) -> tuple[float, float]:
    """95 % interval of the difference of two independent probabilities.

    Args:
        first: Share of the first sample, in [0, 1].
        second: Share of the second sample, which is subtracted.
        count_first: Trials of the first sample, at least 1.
        count_second: Trials of the second sample, at least 1.

    Returns:
        Lower and upper end, in [-1, 1].
    """
    low_1, high_1 = wilson_interval(first, count_first)
    low_2, high_2 = wilson_interval(second, count_second)
    difference = first - second
    return (
        difference - math.hypot(first - low_1, high_2 - second),
        difference + math.hypot(high_1 - first, second - low_2),
    )
