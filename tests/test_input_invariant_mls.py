"""Input-invariant sensitivity against closed forms, float64 autograd and its invariances."""

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
from tasks.input_invariant_mls import InputInvariantMls
from tasks.measurement import MeasurementError, Row, Status, Subject
from tasks.outline import Outline
from tasks.self_test import self_test
from tasks.sensitivity import NormalizedMls

COUNT = 6
FIRST = 1500
METHODS = ("exact", "hutchinson")
wide_vit = functools.partial(oracles.tiny_vit, 2, num_classes=100, depth=2)


@functools.cache
def network(name: str) -> nn.Module:
    if name == "trained_100_outputs":
        return oracles.trained(wide_vit)
    return jacobian_oracles.network(name)


def images(count: int = COUNT) -> torch.Tensor:
    return oracles.digits()[0][FIRST : FIRST + count]


@functools.cache
def exact(name: str) -> tuple[np.ndarray, np.ndarray]:
    """||J diag(x)||_F^2 and ||J x||^2 / M of each image, from plain autograd."""
    found = []
    for image in images().double():
        j = jacobian_oracles.path_jacobians(network(name), image, "sigmoid")[""]
        x = image.flatten().numpy()
        found.append((((j * x) ** 2).sum(), ((j @ x) ** 2).sum() / x.size))
    return tuple(np.array(found).T)  # type: ignore[return-value]


def measured(of: Subject, count: int = COUNT, **settings: object) -> tuple[list[Row], list[Row]]:
    rows = InputInvariantMls(**settings).measure(of, Block(range(count)))  # type: ignore[arg-type]
    assert {r.quantity for r in rows[::2]} == {"input_invariant_mls"}
    assert {r.quantity for r in rows[1::2]} == {"input_invariant_mls_jvp_x"}
    return rows[::2], rows[1::2]


def values(rows: list[Row]) -> np.ndarray:
    return np.array([row.value for row in rows])


class Normalised(nn.Module):
    """A network that does not notice the scale of its images: J x = 0 but for LayerNorm's eps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x.flatten(1)))


@pytest.mark.parametrize("method", METHODS)
def test_intervals_of_a_product_that_cancels_hold_the_float64_value(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normalised()
    coarse, fine = (
        measured(
            oracles.make_subject(model.to(dtype), 10 * images(), output="identity"), method=method
        )[1]
        for dtype in (torch.float32, torch.float64)
    )
    for row, true in zip(coarse, values(fine), strict=True):
        assert row.lower <= true <= row.upper


@pytest.mark.parametrize("method", METHODS)
def test_closed_forms_of_the_linear_examples(method):
    """59 and 63 (Eq. 43) on one and two layers; 101 / 3 by the paper's code."""
    model, x = oracles.worked_example()
    measurement = InputInvariantMls(method=method)
    of = oracles.make_subject(model, x, output="identity")
    rows = measurement.measure(of, Block(range(2)))
    ours, authors = measurement.summarize(oracles.columns(rows))
    assert ours.value == pytest.approx(59, rel=1e-12)
    assert ours.stderr == pytest.approx(30, rel=1e-12)  # images 29 and 89
    assert authors.value == pytest.approx(101 / 3, rel=1e-12)
    second = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    both = jacobian_oracles.linear(model.weight.detach(), second)
    rows = measured(oracles.make_subject(both, x, output="identity"), 2, method=method)
    assert values(rows[0]).mean() == pytest.approx(63, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["trained_100_outputs", "vit_wide", "cnn", "mlp"])
def test_exact_intervals_hold_the_reference(name, dtype):
    of = oracles.make_subject(copy.deepcopy(network(name)).to(dtype), images())
    width = 1e-3 if dtype == torch.float32 else 1e-11
    for rows, truth in zip(measured(of, method="exact"), exact(name), strict=True):
        for row, t in zip(rows, truth, strict=True):
            # A sum with cancellation: rounding is relative to the row, not to its product with x.
            assert row.value == pytest.approx(t, rel=width)
            assert row.status is Status.OK
    for row, t in zip(measured(of, method="exact")[0], exact(name)[0], strict=True):
        assert row.lower * (1 - 1e-12) <= t <= row.upper * (1 + 1e-12)
        assert row.upper - row.lower < width * t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["trained_100_outputs", "vit_wide", "cnn"])
def test_probes_meet_the_target_and_agree_with_the_reference(name, dtype):
    of = oracles.make_subject(copy.deepcopy(network(name)).to(dtype), images())
    ours, authors = measured(of, method="hutchinson")
    for row, t in zip(ours, exact(name)[0], strict=True):
        assert row.status is Status.OK
        assert row.stderr <= 0.02 * row.value
        # 4 standard errors of few effective probes, beside float32 rounding.
        assert abs(row.value - t) <= 6 * row.stderr + 1e-3 * t
    rtol = 1e-3 if dtype == torch.float32 else 1e-11
    np.testing.assert_allclose(values(authors), exact(name)[1], rtol=rtol)


def test_probes_are_unbiased_and_their_error_is_as_stated():
    """8 probes whatever their error, over seeds; the sizes say that deflation helps."""
    truth = exact("trained_100_outputs")[0]
    model = copy.deepcopy(network("trained_100_outputs"))
    rows = np.array(
        [
            [(row.value, row.stderr) for row in measured(
                oracles.make_subject(model, images(), seed=seed), method="hutchinson",
                target_relative_stderr=1e-12, max_draws=8,
            )[0]]
            for seed in range(25)
        ]
    )  # fmt: skip
    errors = rows[:, :, 0] / truth - 1
    stated = rows[:, :, 1] / truth
    assert abs(errors.mean()) < 4 * errors.std() / errors.size**0.5
    assert 0.7 < (stated**2).mean() ** 0.5 / (errors**2).mean() ** 0.5 < 1.4
    assert (errors**2).mean() ** 0.5 < 0.05


@pytest.mark.parametrize("name", ["trained_100_outputs", "vit_wide", "cnn", "mlp"])
def test_order_of_the_three_sensitivities_holds_for_every_image(name):
    """||J x||^2 / M <= IIMLS <= ||x||^2 sigma_1^2."""
    of = oracles.make_subject(copy.deepcopy(network(name)).double(), images())
    ours, authors = measured(of, method="exact")
    rows = NormalizedMls(method="dense").measure(of, Block(range(COUNT)))
    normalized = values([row for row in rows if row.quantity == "normalized_mls"])
    assert (values(authors) <= values(ours) * (1 + 1e-9)).all()
    assert (values(ours) <= normalized * (1 + 1e-9)).all()


@settings(max_examples=10, deadline=None)
@given(
    factor=st.floats(1e-2, 1e2), spread=st.floats(0, 2), seed=st.integers(0, 2**31),
    method=st.sampled_from(METHODS),
)  # fmt: skip
def test_unchanged_when_inputs_are_rescaled_one_by_one_and_squared_under_output_scaling(
    factor, spread, seed, method
):
    """x -> D x with W_1 D^-1; f -> c f multiplies it by c^2. The paper's ||J x||^2 / M likewise."""
    x = images(2).double()
    random = torch.Generator().manual_seed(seed)
    scales = torch.exp(spread * torch.randn(64, generator=random, dtype=torch.float64))
    model = oracles.mlp(seed).double()
    scaled = copy.deepcopy(model)
    scaled[1].weight.data /= scales
    for tensor in (scaled[5].weight, scaled[5].bias):
        tensor.data *= factor
    before, after = (
        measured(oracles.make_subject(m, y, output="identity"), 2, method=method)
        for m, y in ((model, x), (scaled, x * scales.reshape(1, 1, 8, 8)))
    )
    for a, b in zip(after, before, strict=True):
        np.testing.assert_allclose(values(a), factor**2 * values(b), rtol=1e-8)


@settings(max_examples=8, deadline=None)
@given(scale=st.floats(1e-2, 1e2), seed=st.integers(0, 2**31), method=st.sampled_from(METHODS))
def test_laws_of_relu_networks_without_biases(scale, seed, method):
    """theta -> a theta multiplies by a^(2 L), x -> c x by c^2."""
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(s, generator=random, dtype=torch.float64) for s in ((9, 64), (5, 9))]
    x = images(2).double()

    def of(a: float, c: float) -> np.ndarray:
        first, second = (a * w for w in weights)
        model = nn.Sequential(
            jacobian_oracles.linear(first), nn.ReLU(), jacobian_oracles.linear(second)
        )
        subject = oracles.make_subject(model, c * x, output="identity")
        return values(measured(subject, 2, method=method)[0])

    np.testing.assert_allclose(of(scale, 1.0), scale**4 * of(1.0, 1.0), rtol=1e-9)
    np.testing.assert_allclose(of(1.0, scale), scale**2 * of(1.0, 1.0), rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_black_image_has_no_sensitivity_to_its_pixels(method):
    of = oracles.make_subject(oracles.mlp(), 0 * images(2))
    for rows in measured(of, 2, method=method):
        assert [(row.value, row.status) for row in rows] == 2 * [(0.0, Status.OK)]


def test_draw_limit_gives_a_wide_error_and_says_so():
    of = oracles.make_subject(copy.deepcopy(network("vit_wide")), images())
    measurement = InputInvariantMls(method="hutchinson", target_relative_stderr=1e-9, max_draws=8)
    rows = measurement.measure(of, Block(range(COUNT)))
    ours, authors = measurement.summarize(oracles.columns(rows))
    assert ours.status is Status.TARGET_NOT_REACHED
    stated = [row.stderr for row in rows[::2]]
    assert ours.stderr_draws == pytest.approx(sum(s**2 for s in stated) ** 0.5 / COUNT, rel=1e-12)
    assert 0 < ours.stderr_draws < ours.stderr
    assert authors.status is Status.OK
    assert np.isnan(authors.stderr_draws)


def test_numbers_do_not_depend_on_batches():
    model = copy.deepcopy(network("trained_100_outputs")).double()
    for method in METHODS:
        whole, single = (
            values(measured(oracles.make_subject(model, images(), batch_size=b), method=method)[0])
            for b in (COUNT, 1)
        )
        np.testing.assert_allclose(whole, single, rtol=1e-9)


def test_auto_takes_rows_where_they_are_few_and_says_which_it_takes():
    few = oracles.make_subject(copy.deepcopy(network("trained_100_outputs")), images())
    assert measured(few)[0][0].num_iterations == 32  # features of the head
    many = oracles.make_subject(oracles.mlp(outputs=80, hidden=90), images())
    assert all(row.num_probes > 0 for row in measured(many)[0])
    sizes = {"num_parameters": 1, "forward_flops": 1}
    large = Outline(data_config={"input_size": (3, 224, 224)}, num_outputs=1000, **sizes)
    small = Outline(data_config={"input_size": (1, 28, 28)}, num_outputs=10, **sizes)
    assert "128 probes at most" in InputInvariantMls().note(large)
    assert "10 exact rows" in InputInvariantMls().note(small)
    assert InputInvariantMls().forward_equivalents(large) < 100


def test_broken_networks_are_refused():
    broken = oracles.mlp()
    of = oracles.make_subject(broken, images())
    self_test(of)
    broken[5].bias.data[0] = torch.nan
    for method in METHODS:
        with pytest.raises(MeasurementError, match="NaN or infinit"):
            measured(of, method=method)
