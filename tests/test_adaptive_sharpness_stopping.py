"""Adaptive sharpness: which settings are accepted, when it stops, and the authors' draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.measurement import Status


def synthetic(values: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
    """Columns of a complete measurement from values of shape (images, draws)."""
    sample, draw = (axis.reshape(-1) for axis in np.indices(values.shape))
    quantity = np.full(sample.size, "adaptive_sharpness", dtype=object)
    value = values.reshape(-1)
    return {
        "quantity": quantity, "value": value, "sample": sample, "draw": draw,
        "group": sample // group_size,
    }  # fmt: skip


@given(
    samples=st.integers(1, 300), available=st.integers(300, 2000), more=st.integers(0, 3000),
    draws=st.integers(1, 9), more_draws=st.integers(0, 100),
)  # fmt: skip
def test_stages_only_grow_and_only_the_last_is_complete(
    samples, available, more, draws, more_draws
):
    measurement = AdaptiveSharpness(
        min_draws=draws, max_draws=draws + more_draws, max_samples=samples + more
    )
    stages = measurement.stages(samples, available)
    sizes = [(len(stage.samples), len(stage.draws)) for stage in stages]
    assert sizes[0] == (samples, draws)
    assert sizes[-1] == (min(samples + more, available), draws + more_draws)
    for earlier, later in itertools.pairwise(stages):
        assert earlier.samples.start == later.samples.start == 0
        assert earlier.draws.start == later.draws.start == 0
        assert len(earlier) < len(later)
    for (n, d), (n2, d2) in itertools.pairwise(sizes):
        assert (n2 > n and d2 == d) or (n2 == n == sizes[-1][0] and d2 > d)


def test_settings_that_cannot_change_a_row_stay_out_of_the_key():
    key = AdaptiveSharpness().key_fields()
    wider = AdaptiveSharpness(
        min_draws=3, max_draws=99, max_samples=10**6, target_relative_stderr=0.001
    )
    assert wider.key_fields() == key
    for change in ({"rho": 0.2}, {"group_size": 4}, {"method": "one_sided"}):
        assert AdaptiveSharpness(**change).key_fields() != key


@pytest.mark.parametrize(
    "conflict",
    [
        {"group_size": 8}, {"min_draws": 2}, {"max_draws": 64},
        {"max_samples": 500}, {"target_relative_stderr": 0.05},
    ],
)  # fmt: skip
def test_authors_method_refuses_settings_that_contradict_it(conflict):
    (name,) = conflict
    with pytest.raises(ValueError, match=f"'authors' means {name}"):
        AdaptiveSharpness(method="authors", **conflict)


def test_authors_method_survives_a_round_trip_and_has_their_stages():
    measurement = AdaptiveSharpness(method="authors", rho=0.03)
    assert AdaptiveSharpness.model_validate(measurement.model_dump()) == measurement
    assert [len(stage.draws) for stage in measurement.stages(100, 1000)] == [50, 100, 200]
    assert measurement.alignment == 1


def test_impossible_coverage_is_refused():
    with pytest.raises(ValueError, match="max_draws = 1 is below min_draws = 2"):
        AdaptiveSharpness(max_draws=1)
    with pytest.raises(ValueError, match="max_samples = 50 is below samples = 100"):
        AdaptiveSharpness(max_samples=50).stages(100, 1000)


def test_authors_method_gives_spread_out_images_more_draws_and_uses_just_those():
    """Loss standard deviations 1, 11.5, 100 at rho 0.1: int(std)**2 clipped gives 50, 121, 200."""
    measurement = AdaptiveSharpness(method="authors")
    rng = np.random.default_rng(0)
    pattern = np.tile([1.0, -1.0], 100)
    values = np.array([[1.0], [11.5], [100.0]]) * pattern / 0.1**2 + 500
    values[0, 50:], values[1, 121:] = 1e9, 1e9  # must not be read
    rows = synthetic(values, 1)
    assert not measurement.finished({k: v[rows["draw"] < 50] for k, v in rows.items()})
    assert not measurement.finished({k: v[rows["draw"] < 100] for k, v in rows.items()})
    assert measurement.finished(rows)
    order = rng.permutation(values.size)
    (result,) = measurement.summarize({k: v[order] for k, v in rows.items()})
    assert result.num_rows == 50 + 121 + 200
    expected = [values[0, :50].mean(), values[1, :121].mean(), values[2].mean()]
    assert result.value == pytest.approx(np.mean(expected), rel=1e-12)


def test_stopping_waits_for_samples_then_groups_then_draws():
    rng = np.random.default_rng(0)

    def rows(images: int, draws: int, *, between: float, within: float) -> dict:
        spread = between * rng.standard_normal((images, 1))
        return synthetic(1 + spread + within * rng.standard_normal((images, draws)), 4)

    growing = AdaptiveSharpness(group_size=4, max_samples=4096)
    fixed = AdaptiveSharpness(group_size=4)
    precise = {"between": 0.01, "within": 0.01}
    # Target reached: not with few groups while there are more images to ask.
    assert not growing.finished(rows(64, 2, **precise))
    assert growing.finished(rows(256, 2, **precise))
    assert fixed.finished(rows(64, 2, **precise))
    # Only images spread: more of them, or nothing.
    images = {"between": 5.0, "within": 0.01}
    assert not growing.finished(rows(256, 2, **images))
    assert fixed.finished(rows(256, 2, **images))
    assert growing.finished(rows(512, 4, **images))  # draws were added, so images are exhausted
    (result,) = fixed.summarize(rows(256, 2, **images))
    assert result.status is Status.LIMITED_BY_SAMPLES
    # Only draws spread: go on to the budget's end.
    draws = {"between": 0.01, "within": 5.0}
    assert not fixed.finished(rows(256, 2, **draws))
    (result,) = fixed.summarize(rows(256, 2, **draws))
    assert result.status is Status.TARGET_NOT_REACHED
