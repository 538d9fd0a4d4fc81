"""Participation ratio and Frobenius norm of the input Jacobian against dense float64 SVDs."""

from __future__ import annotations

import copy
import functools

import jacobian_oracles
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tasks.block import Block
from tasks.local_dimensionality import LocalDimensionality
from tasks.measurement import MeasurementError, Row, Status, Subject
from tasks.outline import Outline
from tasks.self_test import self_test

COUNT = 6
FIRST = 1500  # digits from here on were not trained on
METHODS = ("dense", "probes")
wide_vit = functools.partial(oracles.tiny_vit, 2, num_classes=100, depth=2)


def images(count: int = COUNT) -> torch.Tensor:
    return oracles.digits()[0][FIRST : FIRST + count]


def pairs(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    ratios, norms = rows[::2], rows[1::2]
    assert {r.quantity for r in ratios} == {"local_dimensionality"}
    assert {r.quantity for r in norms} == {"jacobian_norm_squared"}
    assert [r.sample for r in ratios] == [r.sample for r in norms]
    return ratios, norms


def measured(of: Subject, count: int = COUNT, **settings: object) -> tuple[list[Row], list[Row]]:
    return pairs(LocalDimensionality(**settings).measure(of, Block(range(count))))  # type: ignore[arg-type]


def values(rows: list[Row]) -> np.ndarray:
    return np.array([row.value for row in rows])


@functools.cache
def exact(name: str) -> tuple[np.ndarray, np.ndarray]:
    s = jacobian_oracles.exact_spectra(network(name), images())[""]
    return (s**2).sum(1) ** 2 / (s**4).sum(1), (s**2).sum(1)


@functools.cache
def network(name: str) -> nn.Module:
    if name == "trained":
        return oracles.trained(oracles.tiny_vit)
    if name == "trained_100_outputs":
        return oracles.trained(wide_vit)
    return jacobian_oracles.network(name)


@pytest.mark.parametrize("method", METHODS)
def test_closed_forms_of_the_linear_examples(method):
    """(sum s^2)^2 / sum s^4 = 121 / 85 with ||W||_F^2 = 11; 1.663594 for two layers."""
    model, x = oracles.worked_example()
    rows = measured(oracles.make_subject(model, x, output="identity"), 2, method=method)
    np.testing.assert_allclose(values(rows[0]), 121 / 85, rtol=1e-12)
    np.testing.assert_allclose(values(rows[1]), 11, rtol=1e-12)
    second = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    both = jacobian_oracles.linear(model.weight.detach(), second)
    rows = measured(oracles.make_subject(both, x, output="identity"), 2, method=method)
    np.testing.assert_allclose(values(rows[0]), 1.663594, rtol=1e-6)
    np.testing.assert_allclose(values(rows[1]), 19, rtol=1e-12)  # of [[3, 1, 1], [2, 0, -2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["trained", "trained_100_outputs", "cnn", "mlp", "vit_wide"])
def test_dense_intervals_hold_the_dense_svd(name, dtype):
    of = oracles.make_subject(copy.deepcopy(network(name)).to(dtype), images())
    for rows, truth in zip(measured(of, method="dense"), exact(name), strict=True):
        for row, t in zip(rows, truth, strict=True):
            # The reference has roundoff of its own.
            assert row.lower * (1 - 1e-12) <= t <= row.upper * (1 + 1e-12)
            assert row.upper - row.lower < (2e-3 if dtype == torch.float32 else 1e-10) * t
            assert row.status is Status.OK
            assert row.stderr is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["trained", "trained_100_outputs", "cnn", "vit_wide"])
def test_probes_meet_the_target_and_agree_with_the_dense_svd(name, dtype):
    of = oracles.make_subject(copy.deepcopy(network(name)).to(dtype), images())
    for rows, truth in zip(measured(of, method="probes"), exact(name), strict=True):
        for row, t in zip(rows, truth, strict=True):
            assert row.status is Status.OK
            assert row.stderr <= 0.02 * row.value
            # 4 standard errors of few effective probes, beside float32 rounding.
            assert abs(row.value - t) <= 6 * row.stderr + 2e-3 * t
            assert row.lower is None


def test_errors_of_probes_are_as_stated_over_many_seeds():
    """Two looks at 8 and 16 probes of a trained network, whose spectra fall steeply."""
    ratios, norms = exact("trained_100_outputs")
    model = copy.deepcopy(network("trained_100_outputs"))
    scores, sizes = [], []
    for seed in range(12):
        of = oracles.make_subject(model, images(), seed=seed)
        for rows, truth in zip(
            measured(of, method="probes", target_relative_stderr=1e-12, max_draws=8),
            (ratios, norms), strict=True,
        ):  # fmt: skip
            scores.append([(r.value - t) / r.stderr for r, t in zip(rows, truth, strict=True)])
            sizes.append([r.stderr / t for r, t in zip(rows, truth, strict=True)])
    scores = np.array(scores)
    assert np.max(sizes) < 0.1  # 4 steps take so much: 8 plain probes would leave 35 % and more
    assert np.median(np.abs(scores)) < 1.2  # 0.71 for Student's t with 7 degrees
    assert abs(np.mean(np.clip(scores, -4, 4))) < 4 * 1.5 / scores.size**0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["trained_100_outputs", "vit_wide", "mlp"])
def test_ratio_lies_between_one_and_the_rank(name, method):
    of = oracles.make_subject(copy.deepcopy(network(name)), images())
    s = jacobian_oracles.exact_spectra(network(name), images())[""]
    rank = (s > 1e-10 * s[:, :1]).sum(1)
    found = values(measured(of, method=method)[0])
    assert (found >= 1).all()
    assert (found <= rank).all()


@settings(max_examples=10, deadline=None)
@given(
    factor=st.floats(1e-3, 1e3), stretch=st.floats(1e-2, 1e2), seed=st.integers(0, 2**31),
    method=st.sampled_from(METHODS),
)  # fmt: skip
def test_scaling_laws(factor, stretch, seed, method):
    """f -> c f and x -> s x with W_1 / s leave the ratio; the norm is c^2 / s^2 times."""
    x = images(2).double()
    model = oracles.mlp(seed).double()
    scaled = copy.deepcopy(model)
    scaled[1].weight.data /= stretch
    for tensor in (scaled[5].weight, scaled[5].bias):
        tensor.data *= factor
    before, after = (
        measured(oracles.make_subject(m, y, output="identity"), 2, method=method)
        for m, y in ((model, x), (scaled, stretch * x))
    )
    np.testing.assert_allclose(values(after[0]), values(before[0]), rtol=1e-9)
    ratio = (factor / stretch) ** 2
    np.testing.assert_allclose(values(after[1]), ratio * values(before[1]), rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_saturated_outputs_keep_their_ratio(method):
    """Slopes of 1e-130, whose fourth powers underflow even in float64."""
    weight = torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, -1.0]])
    layer = nn.Linear(3, 2)
    layer.weight.data, layer.bias.data = weight, torch.zeros(2)
    x = torch.zeros(2, 1, 1, 3)
    of = oracles.make_subject(nn.Sequential(nn.Flatten(), layer), x)
    self_test(of)  # whose plain products underflow where the first two images are saturated
    layer.bias.data = torch.tensor([-300.0, -300.0])
    ratios, norms = measured(of, 2, method=method)
    np.testing.assert_allclose(values(ratios), 121 / 85, rtol=1e-5)
    np.testing.assert_allclose(values(norms), 11 * np.exp(-600.0), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_zero_jacobian_is_nan_with_a_status_and_zero_norm(method):
    """x -> W relu(x) is dead at negative images."""
    model, x = oracles.worked_example()
    model = nn.Sequential(nn.ReLU(), model)
    x = torch.cat([x, -x[:1]])
    of = oracles.make_subject(model, x, output="identity")
    measurement = LocalDimensionality(method=method)
    rows = measurement.measure(of, Block(range(3)))
    ratios, norms = pairs(rows)
    assert [r.status for r in ratios] == [Status.OK, Status.OK, Status.NOT_FINITE]
    assert np.isnan(ratios[2].value)
    assert (norms[2].value, norms[2].status) == (0, Status.OK)
    ratio, norm = measurement.summarize(oracles.columns(rows))
    assert np.isnan(ratio.value)
    assert ratio.status is Status.NOT_FINITE
    assert np.isfinite(norm.value)


def test_draw_limit_gives_a_wide_error_and_says_so():
    of = oracles.make_subject(copy.deepcopy(network("vit_wide")), images())
    measurement = LocalDimensionality(method="probes", target_relative_stderr=1e-9, max_draws=8)
    rows = measurement.measure(of, Block(range(COUNT)))
    assert {row.status for row in rows} == {Status.TARGET_NOT_REACHED}
    assert {row.num_probes for row in rows} == {8}
    for estimate in measurement.summarize(oracles.columns(rows)):
        assert estimate.status is Status.TARGET_NOT_REACHED
        chosen = [row.stderr for row in rows if row.quantity == estimate.quantity]
        expected = sum(s**2 for s in chosen) ** 0.5 / COUNT
        assert estimate.stderr_draws == pytest.approx(expected, rel=1e-12)


def test_numbers_do_not_depend_on_batches_or_ranges():
    model = copy.deepcopy(network("trained_100_outputs")).double()
    of = oracles.make_subject(model, images(), batch_size=4)
    whole = LocalDimensionality(method="probes").measure(of, Block(range(COUNT)))
    other = oracles.make_subject(model, images(), batch_size=1)
    parts = [LocalDimensionality(method="probes").measure(other, Block(r))
             for r in (range(4, COUNT), range(4))]  # fmt: skip
    np.testing.assert_allclose(values(whole), values(parts[1] + parts[0]), rtol=1e-9)
    seeded = oracles.make_subject(model, images(), seed=1)
    again = LocalDimensionality(method="probes").measure(seeded, Block(range(COUNT)))
    assert not np.array_equal(values(whole), values(again))


def test_auto_takes_rows_where_they_are_few_and_says_which_it_takes():
    few = oracles.make_subject(copy.deepcopy(network("trained_100_outputs")), images())
    assert measured(few)[0][0].num_iterations == 32  # features of the head
    many = oracles.make_subject(oracles.mlp(outputs=80, hidden=90), images())
    rows = measured(many)[0]
    assert all(row.stderr is not None and row.num_probes > 0 for row in rows)
    sizes = {"num_outputs": 1000, "num_parameters": 1, "forward_flops": 1}
    network_of = Outline(data_config={"input_size": (3, 224, 224)}, **sizes)
    assert LocalDimensionality().note(network_of) == (
        "128 probes at most, 74 MiB (float32) per image"
    )
    dense = LocalDimensionality(method="dense")
    assert dense.note(network_of) == "1000 exact rows, 574 MiB (float32) per image"
    assert dense.forward_equivalents(network_of) > 1000
    assert LocalDimensionality().forward_equivalents(network_of) < 100


def test_predicted_work_is_near_what_a_trained_network_takes():
    of = oracles.make_subject(copy.deepcopy(network("trained_100_outputs")), images())
    rows = measured(of, method="probes")[0]
    sizes = {"num_outputs": 100, "num_parameters": 1, "forward_flops": 1}
    network_of = Outline(data_config={"input_size": (1, 8, 8)}, **sizes)
    predicted = LocalDimensionality(method="probes").forward_equivalents(network_of)
    assert 0.5 < predicted / np.median([row.forward_equivalents for row in rows]) < 2


def test_memory_too_small_for_one_image_and_broken_networks_are_refused():
    of = oracles.make_subject(copy.deepcopy(network("trained")), images())
    with pytest.raises(MeasurementError, match="memory_gib"):
        measured(of, method="dense", memory_gib=1e-6)
    broken = oracles.mlp()
    of = oracles.make_subject(broken, images())
    self_test(of)
    broken[5].bias.data[0] = torch.nan
    for method in METHODS:
        with pytest.raises(MeasurementError, match="NaN or infinit"):
            measured(of, method=method)
