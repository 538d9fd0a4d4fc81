"""Adaptive sharpness in the limit: three numbers that differ, and differences that pair."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from curvature import SMALL_NETWORKS, Square, TwoLayers, all_signs, flat, loss_hessians, means
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import columns, digits, make_subject, worked_example
from torch import nn

from tasks.adaptive_limit import AdaptiveSharpnessLimit
from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.block import Block
from tasks.directional import quadratic_forms
from tasks.measurement import Estimate, MeasurementError, Row, Status, Subject
from tasks.random import generator

HESSIAN, GAUSS_NEWTON, RESIDUAL, EXCESS = AdaptiveSharpnessLimit.quantities


def measure(
    measurement: AdaptiveSharpnessLimit, subject: Subject, samples: int, draws: int
) -> list[Row]:
    return measurement.measure(subject, Block(range(samples), range(draws)))


def estimates(measurement: AdaptiveSharpnessLimit, rows: list[Row]) -> dict[str, Estimate]:
    return {found.quantity: found for found in measurement.summarize(columns(rows))}


def timeless(rows: list[Row]) -> list[Row]:
    return [dataclasses.replace(row, seconds=0.0) for row in rows]


def weighted_diagonals(model: nn.Module, subject: Subject, samples: int) -> tuple[float, float]:
    """sum_k H_kk theta_k^2 with the Hessian and with its Gauss-Newton part."""
    hessian, gauss_newton = loss_hessians(model, subject.batch(range(samples)), subject.output)
    squares = flat(dict(model.named_parameters())).square()
    return (hessian.diagonal() @ squares).item(), (gauss_newton.diagonal() @ squares).item()


def test_worked_examples_have_59_and_236_over_all_signs():
    images = worked_example()[1]
    for model, expected in ((worked_example()[0], 59), (TwoLayers(), 236)):
        subject = make_subject(model, images, torch.tensor([1, 0]), output="identity")
        batch, weights = subject.batch(range(2)), dict(model.named_parameters())
        forms = [
            quadratic_forms(subject, batch, {k: s * weights[k] for k, s in signs.items()})
            for signs in all_signs(model)
        ]
        assert np.mean([f.gauss_newton for f in forms]) == pytest.approx(expected, rel=1e-12)
        assert np.mean([f.residual for f in forms]) == pytest.approx(0, abs=1e-10)


def test_linear_network_has_59_without_residual_or_excess():
    model, images = worked_example()
    subject = make_subject(model, images.repeat(50, 1, 1, 1), output="identity")
    measurement = AdaptiveSharpnessLimit(rho=0.5)
    rows = measure(measurement, subject, 100, 20)
    found = estimates(measurement, rows)
    for quantity in (HESSIAN, GAUSS_NEWTON):
        assert found[quantity].value == pytest.approx(59, abs=4 * found[quantity].stderr)
        assert found[quantity].stderr < 0.1 * 59
    # The loss is quadratic in the weights: exact for every draw at every rho.
    assert (means(rows, RESIDUAL) == 0).all()
    assert np.abs(means(rows, EXCESS)).max() < 1e-9 * 59


@pytest.mark.parametrize(
    ("name", "output", "draws"),
    [("mlp", "sigmoid", 128), ("cnn", "identity", 64), ("vit", "sigmoid", 96)],
)
def test_both_forms_are_those_of_the_dense_hessian(name, output, draws):
    model = SMALL_NETWORKS[name]().double()
    images, labels = digits()
    subject = make_subject(model, images[:8], labels[:8], output=output)
    exact_hessian, exact_gauss_newton = weighted_diagonals(model, subject, 8)
    measurement = AdaptiveSharpnessLimit(group_size=2)
    rows = measure(measurement, subject, 8, draws)
    found = estimates(measurement, rows)
    expected = {
        HESSIAN: exact_hessian,
        GAUSS_NEWTON: exact_gauss_newton,
        RESIDUAL: exact_hessian - exact_gauss_newton,
    }
    # The images are the same, so only draws err.
    for quantity, value in expected.items():
        error = found[quantity].stderr_draws
        assert found[quantity].value == pytest.approx(value, abs=4 * error)
        assert error < 0.2 * abs(exact_hessian)
    sums = means(rows, GAUSS_NEWTON) + means(rows, RESIDUAL)
    assert means(rows, HESSIAN) == pytest.approx(sums, rel=1e-12)


def test_a_row_is_made_of_the_draw_of_its_key():
    images, labels = digits()
    model = SMALL_NETWORKS["vit"]().double()
    subject = make_subject(model, images[:16], labels[:16], seed=7)
    measurement = AdaptiveSharpnessLimit(group_size=4, rho=0.05)
    rows = measurement.measure(subject, Block(range(8, 16), range(3, 4)))
    sizes = [-(-p.numel() // 16) * 16 for p in model.parameters()]
    for group in (2, 3):
        noise = generator(7, "adaptive_sharpness_limit", group, 3)
        parts = torch.randn(sum(sizes), generator=noise).double().split(sizes)
        shift = {
            name: p * part[: p.numel()].view_as(p)
            for (name, p), part in zip(model.named_parameters(), parts, strict=True)
        }
        batch = subject.batch(range(4 * group, 4 * group + 4))
        forms = quadratic_forms(subject, batch, shift)
        losses = []
        for scale in (0, 0.05, -0.05):
            moved = {name: p + scale * shift[name] for name, p in model.named_parameters()}
            logits = torch.func.functional_call(model, moved, (batch.inputs,))
            losses.append((logits.sigmoid() - batch.targets).square().sum(1).numpy())
        for i, sample in enumerate(batch.samples):
            row = {row.quantity: row for row in rows if row.sample == sample}
            assert (row[EXCESS].group, row[EXCESS].draw) == (group, 3)
            hessian = forms.gauss_newton[i] + forms.residual[i]
            assert row[HESSIAN].value == pytest.approx(hessian, rel=1e-9)
            plus, minus = losses[1][i] - losses[0][i], losses[2][i] - losses[0][i]
            assert row[EXCESS].loss_change_plus == pytest.approx(plus, abs=1e-13)
            assert row[EXCESS].loss_change_minus == pytest.approx(minus, abs=1e-13)
            finite = (plus + minus) / (2 * 0.05**2)
            assert row[EXCESS].value == pytest.approx(finite - hessian, abs=1e-10)


def test_excess_vanishes_with_the_square_of_rho():
    images, labels = digits()
    subject = make_subject(SMALL_NETWORKS["vit"]().double(), images[:8], labels[:8])
    large, small = (
        means(measure(AdaptiveSharpnessLimit(rho=rho), subject, 8, 2), EXCESS)
        for rho in (0.004, 0.002)
    )
    # Exactly four times up to the next order, rho^2 relative: the draws are the same.
    assert large == pytest.approx(4 * small, rel=1e-2, abs=1e-2 * np.abs(large).max())
    assert np.abs(large).max() > 1e-7


def test_paired_excess_is_the_difference_of_two_measurements_with_a_smaller_error():
    images, labels = digits()
    subject = make_subject(SMALL_NETWORKS["vit"]().double(), images[:32], labels[:32])
    measurement = AdaptiveSharpnessLimit(rho=0.1, group_size=4)
    excess = estimates(measurement, measure(measurement, subject, 32, 8))[EXCESS]
    finite_measurement = AdaptiveSharpness(rho=0.1, group_size=4)
    finite = finite_measurement.summarize(
        columns(finite_measurement.measure(subject, Block(range(32), range(64))))
    )[0]
    limit, _ = weighted_diagonals(subject.model, subject, 32)
    error = np.hypot(excess.stderr_draws, finite.stderr_draws)
    assert excess.value == pytest.approx(finite.value - limit, abs=4 * error)
    # With an eighth of the draws.
    assert excess.stderr_draws < finite.stderr_draws


def test_hessian_form_can_be_negative_where_the_gauss_newton_form_cannot():
    """f = w^2 x at w = 1 against y = 1: (40) = 6 x^2 - 2 x, (41) = 4 x^2, times z^2."""
    x = torch.full((4, 1, 1, 1), 0.1, dtype=torch.float64)
    subject = make_subject(Square(1.0), x, output="identity")
    measurement = AdaptiveSharpnessLimit(group_size=1)
    rows = measure(measurement, subject, 4, 16)
    assert (means(rows, HESSIAN) < 0).all()
    assert (means(rows, GAUSS_NEWTON) > 0).all()
    ratio = means(rows, HESSIAN) / means(rows, GAUSS_NEWTON)
    assert ratio == pytest.approx(np.full(64, (6 * 0.01 - 0.2) / 0.04), rel=1e-9)
    found = estimates(measurement, rows)
    assert found[HESSIAN].value == pytest.approx(-0.14, abs=4 * found[HESSIAN].stderr)
    # Of fourth order in the noise: ((1 + d)^2 x - 1)^2 has x^2 d^4, so the excess is rho^2 x^2 z^4.
    assert found[EXCESS].value > 0
    squares = means(rows, GAUSS_NEWTON) / 0.04
    assert means(rows, EXCESS) == pytest.approx(0.1**2 * 0.01 * squares**2, rel=1e-6)


class Rescaled(nn.Module):
    """ReLU network whose first layer is scaled up and whose second is scaled down."""

    def __init__(self, factor: float, *, inputs: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.first, self.second = nn.Linear(64, 6).double(), nn.Linear(6, 10).double()
        with torch.no_grad():
            self.first.weight *= factor / inputs
            self.first.bias *= factor
            self.second.weight /= factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.flatten(1)).relu())


@given(factor=st.floats(0.05, 20), inputs=st.floats(0.05, 20), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_rescaling_layers_or_inputs_changes_nothing(factor, inputs, seed):
    """All quantities are invariant, and because noise is relative, draw by draw."""
    images, labels = digits()
    images = images[:3].double()
    plain, rescaled = (
        measure(AdaptiveSharpnessLimit(), make_subject(model, x, labels[:3], seed=seed), 3, 1)
        for model, x in (
            (Rescaled(1.0), images),
            (Rescaled(factor, inputs=inputs), inputs * images),
        )
    )
    scale = max(abs(row.value) for row in plain)
    for a, b in zip(plain, rescaled, strict=True):
        assert b.value == pytest.approx(a.value, abs=1e-9 * scale)


def test_stated_error_of_draws_is_their_spread_over_repeats():
    model = SMALL_NETWORKS["mlp"]().double()
    images, labels = digits()
    subject = make_subject(model, images[:16], labels[:16])
    exact, _ = weighted_diagonals(model, subject, 16)
    measurement = AdaptiveSharpnessLimit(group_size=2)
    repeats = 100
    subjects = [dataclasses.replace(subject, seed=seed) for seed in range(repeats)]
    found = [estimates(measurement, measure(measurement, s, 16, 2))[HESSIAN] for s in subjects]
    spread = np.std([e.value for e in found], ddof=1)
    stated = np.sqrt(np.mean([e.stderr_draws**2 for e in found]))
    # A standard deviation of 100 values errs by 1 / sqrt(200) if they are normal; allowed is twice
    # that variance, for the error of the stated one.
    assert spread == pytest.approx(stated, rel=4 * (2 / (2 * repeats)) ** 0.5)
    mean = np.mean([e.value for e in found])
    assert mean == pytest.approx(exact, abs=4 * stated / repeats**0.5)


def test_rows_do_not_depend_on_ranges_or_their_order():
    images, labels = digits()

    def subject() -> Subject:
        return make_subject(SMALL_NETWORKS["vit"](), images[:16], labels[:16], seed=1)

    measurement = AdaptiveSharpnessLimit(group_size=4)
    whole = timeless(measure(measurement, subject(), 16, 2))
    other, parts = subject(), []
    for draw in (1, 0):
        for start in (8, 12, 0, 4):
            block = Block(range(start, start + 4), range(draw, draw + 1))
            parts += timeless(measurement.measure(other, block))
    assert sorted(parts, key=repr) == sorted(whole, key=repr)
    found, expected = (measurement.summarize(columns(rows)) for rows in (parts, whole))
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("failing_call", [None, 1, 3, 5])
def test_weights_are_bit_identical_afterwards_also_after_an_error(failing_call):
    images, labels = digits()
    model = SMALL_NETWORKS["vit"]()
    subject = make_subject(model, images[:16], labels[:16])
    before = {k: (p, p.data_ptr(), p.clone()) for k, p in model.named_parameters()}
    calls = 0

    def fail(module: nn.Module, inputs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail)
    if failing_call is None:
        measure(AdaptiveSharpnessLimit(), subject, 16, 1)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            measure(AdaptiveSharpnessLimit(), subject, 16, 1)
    handle.remove()
    for name, parameter in model.named_parameters():
        kept, pointer, value = before[name]
        assert parameter is kept
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)
        assert not parameter.requires_grad


def test_nan_names_the_sample_and_overflow_under_noise_is_a_row_of_the_excess_alone():
    images, labels = digits()
    images = images[:8].clone()
    images[5] = float("nan")
    subject = make_subject(SMALL_NETWORKS["mlp"](), images, labels[:8])
    with pytest.raises(MeasurementError, match=r"samples \[5\]"):
        measure(AdaptiveSharpnessLimit(), subject, 8, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    model[1].weight.data.fill_(5e37)  # overflows from 580 % more on
    subject = make_subject(model, torch.ones(16, 1, 1, 1), output="identity")
    measurement = AdaptiveSharpnessLimit(rho=10.0, group_size=1)
    rows = measure(measurement, subject, 16, 1)
    bad = [row for row in rows if row.status is Status.NOT_FINITE]
    assert bad
    assert {row.quantity for row in bad} == {EXCESS}
    assert all(np.isnan(row.value) for row in bad)
    found = estimates(measurement, rows)
    assert found[EXCESS].status is Status.NOT_FINITE
    assert found[HESSIAN].status is not Status.NOT_FINITE


def test_settings_key_and_work():
    measurement = AdaptiveSharpnessLimit()
    assert (
        AdaptiveSharpnessLimit(max_draws=9, max_samples=5).key_fields() == measurement.key_fields()
    )
    for change in ({"rho": 0.2}, {"group_size": 4}):
        assert AdaptiveSharpnessLimit(**change).key_fields() != measurement.key_fields()
    with pytest.raises(ValueError, match="max_draws = 1 is below"):
        AdaptiveSharpnessLimit(max_draws=1)
    images, labels = digits()
    subject = make_subject(SMALL_NETWORKS["mlp"](), images[:20], labels[:20])
    first, *others = measurement.summarize(columns(measure(measurement, subject, 20, 3)))
    assert (first.num_samples, first.num_rows, first.num_probes) == (20, 60, 9)
    assert first.forward_equivalents == 60 * measurement.forward_equivalents(None)  # type: ignore[arg-type]
    assert [other.forward_equivalents for other in others] == [0, 0, 0]
    assert {other.status for other in others} == {first.status}
