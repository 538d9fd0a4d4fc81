"""Intervals of shares: their coverage by exact binomial sums, and published values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from tasks.proportions import newcombe_interval, wilson_interval


def test_wilson_is_the_root_of_the_score_equation():
    """Both ends p solve (share - p)^2 = z^2 p (1 - p) / n."""
    z = scipy.stats.norm.ppf(0.975)
    for count in (1, 7, 100):
        for successes in range(count + 1):
            share = successes / count
            for end in wilson_interval(share, count):
                score = (share - end) ** 2 - z**2 * end * (1 - end) / count
                assert abs(score) < 1e-14
                assert 0 <= end <= 1


def test_intervals_have_width_where_all_or_none_are_right():
    """Closed form at the ends: [n / (n + z^2), 1] and its mirror image."""
    z = scipy.stats.norm.ppf(0.975)
    assert wilson_interval(1.0, 100) == pytest.approx((100 / (100 + z**2), 1.0), rel=1e-12)
    assert wilson_interval(0.0, 100) == pytest.approx((0.0, z**2 / (100 + z**2)), abs=1e-15)
    low, high = newcombe_interval(1.0, 1.0, count_first=100, count_second=100)
    assert low == pytest.approx(-(1 - 100 / (100 + z**2)), rel=1e-12)
    assert high == pytest.approx(-low, rel=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 20), (0.6791, 1.0000)),
        ((10, 10), (0, 10), (0.6075, 1.0000)),
    ],
)
def test_newcombe_gives_the_published_intervals_of_method_10(first, second, expected):
    """Table II of Newcombe (1998), rounded to four decimals there."""
    found = newcombe_interval(
        first[0] / first[1], second[0] / second[1], count_first=first[1], count_second=second[1]
    )
    assert found == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize("count", [20, 100])
def test_wilson_covers_what_it_states_on_average_where_students_interval_does_not(count: int):
    """Exact sums over all outcomes; the mean coverage over true shares is the usual criterion."""
    shares = np.linspace(0.9, 0.999, 100)
    successes = np.arange(count + 1)
    weights = scipy.stats.binom.pmf(successes, count, shares[:, None])
    wilson = np.array([wilson_interval(k / count, count) for k in successes])
    spread = np.sqrt(successes / count * (1 - successes / count) / (count - 1))
    half = scipy.stats.t.ppf(0.975, count - 1) * spread
    student = np.stack([successes / count - half, successes / count + half], axis=1)

    def coverage(ends: np.ndarray) -> float:
        inside = (ends[:, 0] <= shares[:, None]) & (shares[:, None] <= ends[:, 1])
        return float((weights * inside).sum(1).mean())

    # Discrete outcomes make coverage jump around 95 % by a point; Student's misses by far more.
    assert coverage(wilson) == pytest.approx(0.95, abs=0.015)
    assert coverage(student) < 0.9


def test_newcombe_covers_what_it_states_and_more_near_the_ends():
    """Exact double sums: 95 % where both shares are inside, at least 93 % up to a share of 1."""
    count = 40
    successes = np.arange(count + 1)
    ends = np.array(
        [
            [
                newcombe_interval(a / count, b / count, count_first=count, count_second=count)
                for b in successes
            ]
            for a in successes
        ]
    )

    def coverage(first: float, second: float) -> float:
        weights = np.outer(
            scipy.stats.binom.pmf(successes, count, first),
            scipy.stats.binom.pmf(successes, count, second),
        )
        truth = first - second
        return float((weights * ((ends[..., 0] <= truth) & (truth <= ends[..., 1]))).sum())

    inside = [coverage(a, b) for a in (0.62, 0.71, 0.83) for b in (0.53, 0.64, 0.78)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.01)
    extreme = [coverage(a, b) for a in (0.9, 0.97, 0.99, 1.0) for b in (0.7, 0.9, 0.97, 1.0)]
    assert min(extreme) > 0.93
