"""Maximum local sensitivity against dense float64 SVDs, closed forms and scaling laws."""

from __future__ import annotations

import copy
import functools

import numpy as np
import oracles
import pydantic
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from tasks.block import Block
from tasks.measurement import Measurement, MeasurementError, Row, Status, Subject
from tasks.outline import Outline
from tasks.random import generator
from tasks.self_test import self_test
from tasks.sensitivity import NormalizedMls

COUNT = 8  # images per network
FIRST = 1500  # digits from here on were not trained on

# 100 outputs for 10 digits: room for more than ten Lanczos steps, and a spectrum of training.
wide_vit = functools.partial(oracles.tiny_vit, 2, num_classes=100, depth=2)
flat_vit = functools.partial(oracles.tiny_vit, 3, patch_size=4, embed_dim=64, depth=1, num_heads=8)
NETWORKS = {
    "vit_trained": lambda: oracles.trained(oracles.tiny_vit),
    "vit_trained_100_outputs": lambda: oracles.trained(wide_vit),
    "vit_trained_wide_patch_4": lambda: oracles.trained(flat_vit),
    "vit_random_pre_norm_layer_scale": lambda: oracles.tiny_vit(
        4, pre_norm=True, init_values=0.5, depth=6, embed_dim=24, num_classes=60
    ),
    "mlp_trained": lambda: oracles.trained(oracles.mlp),
    "cnn_trained": lambda: oracles.trained(oracles.cnn),
}


@functools.cache
def network(name: str) -> nn.Module:
    return NETWORKS[name]()


@functools.cache
def exact(name: str, output: str = "sigmoid") -> np.ndarray:
    return oracles.exact_sigmas(network(name), images(), output)  # type: ignore[arg-type]


def images(count: int = COUNT) -> torch.Tensor:
    return oracles.digits()[0][FIRST : FIRST + count]


def subject(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> Subject:
    model = copy.deepcopy(network(name)).to(dtype)
    return oracles.make_subject(model, images(), **changes)  # type: ignore[arg-type]


def mls_rows(measurement: Measurement, of: Subject, indices: range = range(COUNT)) -> list[Row]:
    return [row for row in measurement.measure(of, Block(indices)) if row.quantity == "mls"]


def values(rows: list[Row]) -> np.ndarray:
    return np.array([row.value for row in rows])


def inside(row: Row, truth: float) -> bool:
    assert row.lower is not None
    assert row.upper is not None
    # The reference SVD has roundoff of its own, of the order of 1e-15 times the depth.
    return row.lower * (1 - 1e-13) <= truth <= row.upper * (1 + 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_interval_of_one_in_a_thousand_holds_the_dense_svd_of_every_image(name, dtype):
    for output in ("sigmoid", "identity"):
        rows = mls_rows(NormalizedMls(), subject(name, dtype, output=output))
        for row, truth in zip(rows, exact(name, output), strict=True):
            assert row.status is Status.OK
            assert inside(row, truth)
            assert row.upper - row.lower <= 1e-3 * row.value * (1 + 1e-9)
            assert row.lower <= row.value <= row.upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_dense_method_holds_the_dense_svd_within_rounding(name, dtype):
    rows = mls_rows(NormalizedMls(method="dense"), subject(name, dtype))
    for row, truth in zip(rows, exact(name), strict=True):
        assert inside(row, truth)
        assert row.upper - row.lower < (3e-4 if dtype == torch.float32 else 1e-11) * row.value


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("name", NETWORKS)
def test_power_iteration_agrees_to_its_tolerance(name, tolerance):
    """Within tolerance of the top here; the rule itself promises some singular value (Lanczos)."""
    power = NormalizedMls(method="power", tolerance=tolerance, max_iterations=5000)
    rows = mls_rows(power, subject(name, torch.float64))
    np.testing.assert_allclose(values(rows), exact(name), rtol=tolerance)
    assert all(row.lower <= truth for row, truth in zip(rows, exact(name), strict=True))
    assert {(row.status, row.upper) for row in rows} == {(Status.OK, None)}


def test_closed_form_of_the_linear_example():
    """MLS = sigma_1 = 3 and NormMLS = sigma_1^2 mean ||x||^2 = 9 * 17 = 153."""
    model, x = oracles.worked_example()
    for method in ("lanczos", "dense"):
        of = oracles.make_subject(model, x, output="identity")
        measurement = NormalizedMls(method=method)
        rows = measurement.measure(of, Block(range(2)))
        normalized, mls = measurement.summarize(oracles.columns(rows))
        assert mls.quantity == "mls"
        assert mls.value == pytest.approx(3, rel=1e-12)
        assert normalized.quantity == "normalized_mls"
        assert normalized.value == pytest.approx(153, rel=1e-12)
        # Rows are 9 * 9 and 9 * 25: sd / sqrt(2) is half their distance.
        assert normalized.stderr == pytest.approx(72, rel=1e-12)


def test_normalized_rows_are_squares_of_mls_rows_times_the_squared_norm():
    of = subject("vit_trained")
    rows = NormalizedMls().measure(of, Block(range(COUNT)))
    for normalized, mls in zip(rows[::2], rows[1::2], strict=True):
        assert (normalized.quantity, mls.quantity) == ("normalized_mls", "mls")
        assert normalized.sample == mls.sample
        square = float(images()[mls.sample].double().square().sum())
        assert normalized.value == pytest.approx(square * mls.value**2, rel=1e-12)
        assert normalized.lower == pytest.approx(square * mls.lower**2, rel=1e-12)
        assert normalized.upper == pytest.approx(square * mls.upper**2, rel=1e-12)
        # The pair shares its products: their cost is counted once.
        assert normalized.forward_equivalents > 0
        assert mls.forward_equivalents == mls.seconds == 0


@settings(max_examples=15, deadline=None)
@example(factor=179.0, stretch=1.0, seed=1)  # b / ratio leaves float64 near a Ritz value
@given(
    factor=st.floats(1e-3, 1e3),
    stretch=st.floats(1e-2, 1e2),
    seed=st.integers(0, 2**31),
)
def test_scaling_laws(factor, stretch, seed):
    """f -> c f multiplies MLS by c; x -> s x with W_1 / s divides it by s, NormMLS stays."""
    x = images(2).double()
    model = oracles.mlp(seed).double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[-1].weight *= factor
        scaled[1].weight /= stretch

    def pair(model: nn.Module, x: torch.Tensor) -> np.ndarray:
        of = oracles.make_subject(model, x, output="identity")
        return np.array(
            [row.value for row in NormalizedMls().measure(of, Block(range(2)))]
        ).reshape(2, 2)

    before, after = pair(model, x), pair(scaled, stretch * x)
    # Starts are the same, so the iterations are too: only rounding differs.
    np.testing.assert_allclose(after[:, 0], factor**2 * before[:, 0], rtol=1e-9)
    np.testing.assert_allclose(after[:, 1], factor / stretch * before[:, 1], rtol=1e-9)


def strip(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(r.quantity, r.sample, r.value, r.lower, r.upper, r.num_iterations) for r in rows]


@pytest.mark.parametrize("method", ["lanczos", "power", "dense", "authors"])
def test_rows_are_bit_equal_when_a_range_is_cut_at_batches_and_taken_in_any_order(method):
    measurement = NormalizedMls(method=method)
    whole = measurement.measure(subject("vit_trained", batch_size=2), Block(range(COUNT)))
    of = subject("vit_trained", batch_size=2)
    parts = {r: measurement.measure(of, Block(r)) for r in (range(6, 8), range(0, 2), range(2, 6))}
    assert strip(whole) == strip(parts[range(0, 2)] + parts[range(2, 6)] + parts[range(6, 8)])


def test_rows_agree_to_rounding_when_a_range_is_cut_inside_a_batch_or_batches_change():
    of = subject("vit_trained_100_outputs", batch_size=8)
    whole = mls_rows(NormalizedMls(), of)
    cut = mls_rows(NormalizedMls(), of, range(3)) + mls_rows(NormalizedMls(), of, range(3, COUNT))
    single = mls_rows(NormalizedMls(), subject("vit_trained_100_outputs", batch_size=1))
    for other in (cut, single):
        assert [r.sample for r in other] == list(range(COUNT))
        # Rounding of float32 products; one step more or less moves the value by less than that.
        np.testing.assert_allclose(values(other), values(whole), rtol=1e-5)


def test_starts_belong_to_samples_whatever_the_batch_size():
    """Another start would move the upper bounds by far more than float64 rounding."""
    pair = [
        mls_rows(NormalizedMls(), subject("vit_trained_100_outputs", torch.float64, batch_size=b))
        for b in (1, 8)
    ]
    for single, batched in zip(*pair, strict=True):
        assert single.upper == pytest.approx(batched.upper, rel=1e-9)


def test_batches_start_at_multiples_of_their_size_wherever_a_range_starts():
    of = subject("vit_trained", batch_size=2)
    whole = mls_rows(NormalizedMls(), of)
    assert strip(mls_rows(NormalizedMls(), of, range(3, COUNT)))[1:] == strip(whole[4:])


def test_unit_boundaries_do_not_cut_usual_batches():
    assert all(NormalizedMls().alignment % size == 0 for size in (1, 2, 4, 8, 16, 32))


def test_rows_depend_on_the_seed_but_the_intervals_agree():
    rows = [mls_rows(NormalizedMls(), subject("vit_trained_100_outputs", seed=s)) for s in (0, 1)]
    assert strip(rows[0]) != strip(rows[1])
    for a, b in zip(*rows, strict=True):
        assert a.lower <= b.upper
        assert b.lower <= a.upper


def test_iteration_limit_gives_a_wide_valid_interval_and_says_so():
    rows = mls_rows(NormalizedMls(max_iterations=2), subject("vit_trained_100_outputs"))
    for row, truth in zip(rows, exact("vit_trained_100_outputs"), strict=True):
        assert row.status is Status.NOT_CONVERGED
        assert row.num_iterations == 2
        assert inside(row, truth)


def test_tolerance_below_rounding_is_reported_not_pretended():
    rows = mls_rows(NormalizedMls(tolerance=1e-7), subject("vit_trained"))
    for row, truth in zip(rows, exact("vit_trained"), strict=True):
        assert row.status is Status.NOT_CONVERGED
        assert inside(row, truth)


def test_interval_is_widened_by_four_times_the_defect_on_both_sides():
    """Same products, another defect: only the widening may change."""
    of = subject("cnn_trained", torch.float64)
    tight = mls_rows(NormalizedMls(), of)
    result = self_test(of)
    of.cache["self_test"] = type(result)(**(result.to_dict() | {"defect": 1e-5}))
    for wide, row in zip(mls_rows(NormalizedMls(), of), tight, strict=True):
        assert wide.lower == pytest.approx(wide.value * (1 - 4e-5), rel=1e-12)
        assert wide.upper >= row.value * (1 + 4e-5)
        assert wide.upper - wide.lower <= 1e-3 * wide.value * (1 + 1e-9)


def test_rounding_takes_its_share_of_the_tolerance():
    """With 8e-4 of the width gone to the defect, the iteration must go on to 2e-4."""
    of = subject("vit_trained_100_outputs", torch.float64)
    result = self_test(of)
    of.cache["self_test"] = type(result)(**(result.to_dict() | {"defect": 1e-4}))
    for row in mls_rows(NormalizedMls(), of):
        assert row.status is Status.OK
        assert row.upper - row.lower <= 1e-3 * row.value * (1 + 1e-9)


def authors_loop(model: nn.Module, x: torch.Tensor, delta: torch.Tensor) -> float:
    """Their recipe for one image, Adam written out (betas 0.9, 0.999, eps 1e-8)."""
    m, v = torch.zeros_like(delta), torch.zeros_like(delta)
    value = 0.0
    for t in range(1, 31):
        delta = delta.detach().requires_grad_()
        difference = torch.sigmoid(model(x)) - torch.sigmoid(model(x + delta))
        loss = -difference.norm() / delta.norm()
        (gradient,) = torch.autograd.grad(loss, delta)
        value = loss.item() ** 2
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        delta = delta - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return value * float(x.square().sum())


def test_authors_method_is_their_recipe_image_by_image():
    of = subject("mlp_trained", torch.float64, batch_size=4)
    rows = NormalizedMls(method="authors").measure(of, Block(range(COUNT)))[::2]
    for row, image in zip(rows, images().double(), strict=True):
        start = torch.randn(image.shape, generator=generator(0, "authors_mls", row.sample))
        expected = authors_loop(of.model, image[None], 0.1 * start.double()[None])
        # Thirty steps of a smooth network amplify roundoff by some orders of magnitude.
        assert row.value == pytest.approx(expected, rel=1e-6)
        assert row.lower is None
        assert row.upper is None
        assert row.num_iterations == 30


def test_authors_method_finds_a_lower_bound_of_a_linear_network_only():
    """For y = W x the ratio is ||W d|| / ||d|| <= sigma_1; for a trained network it is not."""
    model, x = oracles.worked_example()
    of = oracles.make_subject(model, x, output="identity")
    linear = values(mls_rows(NormalizedMls(method="authors"), of, range(2)))
    assert (linear <= 3 * (1 + 1e-12)).all()
    trained = values(mls_rows(NormalizedMls(method="authors"), subject("mlp_trained")))
    assert (trained / exact("mlp_trained")).max() > 1.001


class NotFinite(nn.Module):
    """sqrt(x^2) of the last pixel: finite everywhere, with the gradient 0/0 where it is 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.flatten(1)[:, :3], x.flatten(1)[:, -1:].square().sqrt()], dim=1)


@pytest.mark.parametrize("method", ["lanczos", "power", "dense"])
def test_an_image_with_infinite_sensitivity_is_kept_and_makes_the_estimate_nan(method):
    x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    x[3, 0, 1, 1] = 0
    measurement = NormalizedMls(method=method, max_iterations=200)
    rows = measurement.measure(oracles.make_subject(NotFinite(), x), Block(range(4)))
    assert [row.status for row in rows] == [Status.OK] * 6 + [Status.NOT_FINITE] * 2
    for estimate in measurement.summarize(oracles.columns(rows)):
        assert estimate.num_samples == 4
        assert np.isnan(estimate.value)
        assert estimate.status is Status.NOT_FINITE


@pytest.mark.parametrize("method", ["lanczos", "power", "dense", "authors"])
def test_nan_logits_name_the_sample(method):
    x = images().clone()
    x[5, 0, 0, 0] = 1e30

    class Overflows(nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return (t * t.abs()).flatten(1)[:, :4] - t.square().flatten(1)[:, :4]

    with pytest.raises(MeasurementError, match=r"samples \[5\]: NaN or infinite logits"):
        NormalizedMls(method=method).measure(
            oracles.make_subject(Overflows(), x), Block(range(COUNT))
        )


@pytest.mark.parametrize("method", ["lanczos", "power", "dense", "authors"])
def test_every_method_refuses_a_network_that_fails_the_self_test(method):
    class Coupled(nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return (t - t.mean(0)).flatten(1)

    with pytest.raises(MeasurementError, match="'coupling'"):
        NormalizedMls(method=method).measure(oracles.make_subject(Coupled(), images()), range(2))


def test_networks_and_data_sets_of_different_class_counts_are_refused():
    of = subject("mlp_trained")
    with torch.no_grad():
        smaller = oracles.mlp(outputs=7)
    wrong = Subject(smaller, of.output, of.batch, of.seed, of.batch_size, of.num_parameters)
    with pytest.raises(MeasurementError, match=r"expected 10 outputs.*found 7"):
        NormalizedMls().measure(wrong, Block(range(2)))


def test_summary_is_the_student_interval_of_the_mean_in_any_order_of_rows():
    def rows(order: list[int]) -> dict[str, np.ndarray]:
        values = [1.0, 2.0, 6.0]
        return oracles.columns(
            [
                Row(quantity, values[i], sample=i, lower=values[i] - 0.5, upper=values[i] + 1.5)
                for i in order
                for quantity in ("mls", "normalized_mls")
            ]
        )

    estimate = NormalizedMls().summarize(rows([0, 1, 2]))[0]
    assert NormalizedMls().summarize(rows([2, 0, 1]))[0] == estimate
    assert estimate.value == 3
    assert estimate.stderr == pytest.approx(np.sqrt(7 / 3))  # variance 7, n = 3
    # Student's quantile at two degrees of freedom has the closed form 0.95 sqrt(2 / (1 - 0.95^2)).
    assert estimate.ci_high - 3 == pytest.approx(0.95 * np.sqrt(2 / 0.0975) * np.sqrt(7 / 3))
    assert estimate.error_bound == 1  # half of lower to upper
    assert estimate.num_samples == 3


def test_one_not_converged_image_shows_in_the_estimate():
    rows = [
        Row("mls", 1.0, sample=0, lower=1.0, upper=1.0),
        Row("mls", 1.0, sample=1, lower=0.5, upper=1.5, status=Status.NOT_CONVERGED),
        Row("normalized_mls", 1.0, sample=0),
    ]
    normalized, mls = NormalizedMls().summarize(oracles.columns(rows))
    assert mls.status is Status.NOT_CONVERGED
    assert normalized.status is Status.OK
    assert np.isnan(normalized.stderr)
    assert np.isnan(normalized.error_bound)


def test_settings_are_checked_and_the_plan_is_one_range():
    for bad in ({"tolerance": 0.0}, {"failure_probability": 1.0}, {"max_iterations": 0}):
        with pytest.raises(pydantic.ValidationError):
            NormalizedMls(**bad)
    assert NormalizedMls().stages(100, 1000) == [Block(range(100))]
    assert NormalizedMls().key_fields() == {
        "metric": "normalized_mls",
        "version": 1,
        "method": "lanczos",
        "tolerance": 1e-3,
        "failure_probability": 1e-9,
        "max_iterations": 64,
    }


def test_predicted_cost_is_near_the_counted_cost():
    counted = np.mean(
        [
            r.forward_equivalents
            for r in NormalizedMls().measure(subject("vit_trained"), Block(range(8)))
        ]
    )
    network = Outline(data_config={}, num_outputs=10, num_parameters=0, forward_flops=0)
    predicted = NormalizedMls().forward_equivalents(network)
    assert predicted / 2 < 2 * counted < 2 * predicted  # every second row carries no cost
