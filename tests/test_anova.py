"""Two-way means: exact small cases, unbiased components, and intervals that cover."""

import numpy as np
import pytest
import scipy.stats

from tasks.anova import Table, grouped_mean, variance_components


def layout(num_images: int, group_size: int, num_draws: int) -> Table:
    samples = np.repeat(np.arange(num_images), num_draws)
    draws = np.tile(np.arange(num_draws), num_images)
    return Table(np.zeros(len(samples)), samples, draws, samples // group_size)


def simulate(
    rng: np.random.Generator,
    shape: Table,
    *,
    image: float = 1.0,
    draw: float = 0.5,
    residual: float = 2.0,
    image_effects: np.ndarray | None = None,
) -> Table:
    """Values with mean 10 and these variance components, normal."""
    num_draws = int(shape.draws.max()) + 1
    images = rng.normal(0, image**0.5, int(shape.samples.max()) + 1)
    images = images if image_effects is None else image_effects
    cells = rng.normal(0, draw**0.5, (int(shape.groups.max()) + 1, num_draws))
    rest = rng.normal(0, residual**0.5, len(shape.values))
    values = 10 + images[shape.samples] + cells[shape.groups, shape.draws] + rest
    return shape._replace(values=values)


def test_one_draw_and_single_images_give_the_textbook_standard_error():
    values = np.array([1.0, 4.0, 2.0, 9.0, 5.0])
    index = np.arange(5)
    mean = grouped_mean(Table(values, index, np.zeros(5, dtype=int), index))
    assert mean.value == pytest.approx(values.mean(), rel=1e-15)
    assert mean.stderr == pytest.approx(values.std(ddof=1) / 5**0.5, rel=1e-14)
    assert np.isnan(mean.stderr_draws)


def test_interval_of_symmetric_values_is_students():
    index = np.arange(5)
    mean = grouped_mean(Table(np.array([1.0, 2, 3, 4, 5]), index, np.zeros(5, dtype=int), index))
    half = 2.7764451051977987 * mean.stderr  # 4 degrees of freedom
    assert (mean.ci_low, mean.ci_high) == pytest.approx((mean.value - half, mean.value + half))


def test_interval_of_skewed_values_reaches_further_on_the_side_of_the_tail():
    """Where Hall's transform of the end point is Student's quantile, by its forward formula."""
    index = np.arange(30)
    values = np.exp(np.linspace(-2, 3, 30))
    for sign in (1, -1):
        mean = grouped_mean(Table(sign * values, index, np.zeros(30, dtype=int), index))
        student = 2.045229642132703  # 29 degrees of freedom
        below, above = mean.value - mean.ci_low, mean.ci_high - mean.value
        near, far = sorted((below, above))
        assert far == (above if sign > 0 else below)
        assert near == pytest.approx(student * mean.stderr, rel=1e-12)
        g = scipy.stats.skew(values, bias=False) / 30**0.5
        t = -far / mean.stderr
        assert t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6 == pytest.approx(-student, rel=1e-9)


def test_group_of_two_images_by_hand():
    # group 0: images (1, 3; 2, 6), group 1: image (4, 8); draws 0 and 1
    table = Table(
        np.array([1.0, 3, 2, 6, 4, 8]),
        np.array([0, 0, 1, 1, 2, 2]),
        np.array([0, 1, 0, 1, 0, 1]),
        np.array([0, 0, 0, 0, 1, 1]),
    )
    mean = grouped_mean(table)
    assert mean.value == 4.0  # image means 2, 4, 6
    # group sums 6 (of 2 images) and 6 (of 1): deviations from 4 n are -2 and 2
    assert mean.stderr == pytest.approx(np.sqrt(2 * (4 + 4)) / 3, rel=1e-15)
    # sums per draw: group 0: 3, 9; group 1: 4, 8: variances of their means 9 and 4
    assert mean.stderr_draws == pytest.approx(np.sqrt(9 + 4) / 3, rel=1e-15)
    assert mean.num_draws == 4


def test_result_is_bit_identical_for_any_order():
    rng = np.random.default_rng(0)
    table = simulate(rng, layout(37, 4, 3))
    expected = grouped_mean(table), variance_components(table)
    for _ in range(5):
        order = rng.permutation(len(table.values))
        shuffled = Table(*(column[order] for column in table))
        assert (grouped_mean(shuffled), variance_components(shuffled)) == expected


def test_variance_components_are_unbiased_also_with_an_incomplete_group():
    rng, shape = np.random.default_rng(1), layout(42, 4, 3)
    found = np.array([variance_components(simulate(rng, shape)) for _ in range(2000)])
    errors = found.mean(0) - [1.0, 0.5, 2.0]
    assert (abs(errors) < 4 * found.std(0) / 2000**0.5).all(), errors


def test_with_single_images_draw_and_residual_are_one_component():
    rng, shape = np.random.default_rng(2), layout(60, 1, 3)
    found = np.array([variance_components(simulate(rng, shape)) for _ in range(2000)])
    assert np.isnan(found[:, 1]).all()
    errors = found[:, [0, 2]].mean(0) - [1.0, 2.5]
    assert (abs(errors) < 4 * found[:, [0, 2]].std(0) / 2000**0.5).all(), errors


def test_one_draw_leaves_the_draw_part_unknown():
    table = simulate(np.random.default_rng(0), layout(16, 4, 1))
    assert np.isnan(grouped_mean(table).stderr_draws)
    assert np.isnan(variance_components(table)).all()


def test_both_standard_errors_match_the_spread_of_repeated_estimates():
    """Variances of 4000 normal repeats are known to 2.2 %; 4 times that is allowed."""
    rng, shape = np.random.default_rng(3), layout(42, 4, 3)
    fixed = rng.normal(0, 1, 42)
    for effects, name in ((None, "stderr"), (fixed, "stderr_draws")):
        means = [grouped_mean(simulate(rng, shape, image_effects=effects)) for _ in range(4000)]
        spread = np.var([mean.value for mean in means], ddof=1)
        predicted = np.mean([getattr(mean, name) ** 2 for mean in means])
        assert predicted == pytest.approx(spread, rel=4 * (2 / 4000) ** 0.5), name


def test_one_group_has_a_value_and_no_error():
    mean = grouped_mean(simulate(np.random.default_rng(0), layout(3, 4, 2)))
    assert np.isfinite(mean.value)
    assert np.isnan([mean.stderr, mean.ci_low, mean.ci_high]).all()


def test_a_value_that_is_not_finite_makes_everything_nan():
    table = simulate(np.random.default_rng(0), layout(16, 4, 2))
    table.values[5] = np.nan
    mean = grouped_mean(table)
    assert np.isnan([mean.value, mean.stderr, mean.stderr_draws, mean.ci_low]).all()
