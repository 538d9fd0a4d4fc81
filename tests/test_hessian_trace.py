"""The Hessian's trace: exact values, sign enumeration, spread, and what the residual is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from curvature import SMALL_NETWORKS, Square, TwoLayers, all_signs, loss_hessians, means
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import columns, digits, make_subject, worked_example
from torch import nn

from tasks.block import Block
from tasks.directional import quadratic_forms
from tasks.hessian_trace import HessianTrace
from tasks.measurement import MeasurementError, Row, Status, Subject


def measure(measurement: HessianTrace, subject: Subject, samples: int, draws: int) -> list[Row]:
    return measurement.measure(subject, Block(range(samples), range(draws)))


def timeless(rows: list[Row]) -> list[Row]:
    return [dataclasses.replace(row, seconds=0.0) for row in rows]


def enumerated(subject: Subject, samples: int) -> tuple[float, float]:
    """Mean over all signs, hence without error, of both quantities."""
    batch = subject.batch(range(samples))
    forms = [quadratic_forms(subject, batch, signs) for signs in all_signs(subject.model)]
    residual = float(np.mean([form.residual for form in forms]))
    return float(np.mean([form.gauss_newton for form in forms])) + residual, residual


def tiny(activation: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Flatten(), nn.Linear(3, 2, bias=False), activation, nn.Linear(2, 1)]
        return nn.Sequential(*layers).double()


def test_worked_examples_have_traces_34_and_304_whatever_the_labels():
    images = worked_example()[1]
    for model, expected in ((worked_example()[0], 34), (TwoLayers(), 304)):
        subject = make_subject(model, images, torch.tensor([1, 0]), output="identity")
        trace, residual = enumerated(subject, 2)
        assert trace == pytest.approx(expected, rel=1e-12)
        assert residual == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("output", ["identity", "sigmoid"])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_all_signs_give_the_trace_of_the_dense_hessian(activation, output):
    model = tiny(activation)
    images = torch.randn(4, 1, 1, 3, generator=torch.Generator().manual_seed(0)).double()
    subject = make_subject(model, images, output=output)
    trace, residual = enumerated(subject, 4)
    hessian, gauss_newton = loss_hessians(model, subject.batch(range(4)), output)
    assert trace == pytest.approx(hessian.trace().item(), rel=1e-9)
    expected = (hessian - gauss_newton).trace().item()
    assert residual == pytest.approx(expected, abs=1e-9 * gauss_newton.trace().item())
    # Piecewise linear in each single weight: Eq. 3 is exact, far from interpolation too.
    assert (abs(residual) < 1e-9) == (isinstance(activation, nn.ReLU) and output == "identity")


@pytest.mark.parametrize(
    ("name", "output", "probes"),
    [("mlp", "sigmoid", 128), ("cnn", "identity", 48), ("vit", "sigmoid", 48)],
)
def test_the_mean_over_probes_is_the_dense_trace(name, output, probes):
    model = SMALL_NETWORKS[name]().double()
    images, labels = digits()
    subject = make_subject(model, images[:8], labels[:8], output=output)
    hessian, gauss_newton = loss_hessians(model, subject.batch(range(8)), output)
    measurement = HessianTrace(group_size=2)
    trace, residual = measurement.summarize(columns(measure(measurement, subject, 8, probes)))
    # The images are the same, so only probes err.
    assert trace.value == pytest.approx(hessian.trace().item(), abs=4 * trace.stderr_draws)
    assert trace.stderr_draws < 0.15 * abs(trace.value)
    expected = (hessian - gauss_newton).trace().item()
    assert residual.value == pytest.approx(expected, abs=4 * residual.stderr_draws)


def test_relu_network_has_the_gauss_newton_trace_for_random_labels():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 10),
        ).double()  # fmt: skip
    images = digits()[0][:16]
    labels = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(0))
    subject = make_subject(model, images, labels, output="identity")
    hessian, gauss_newton = loss_hessians(model, subject.batch(range(16)), "identity")
    assert hessian.trace().item() == pytest.approx(gauss_newton.trace().item(), rel=1e-9)
    measurement = HessianTrace(group_size=2)
    rows = measure(measurement, subject, 16, 32)
    trace, residual = measurement.summarize(columns(rows))
    assert trace.value == pytest.approx(gauss_newton.trace().item(), abs=4 * trace.stderr_draws)
    assert residual.value == pytest.approx(0, abs=4 * residual.stderr_draws)
    assert residual.stderr_draws > 0  # zero on average only


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_trace_can_be_negative_away_from_interpolation(weight):
    """f = w^2 x against y = 1: H = 4 w^2 x^2 + 2 x (w^2 x - 1)."""
    x = torch.tensor([-0.5, 0.02, 1.0]).double().reshape(3, 1, 1, 1)
    subject = make_subject(Square(weight), x, torch.zeros(3, dtype=torch.long), output="identity")
    rows = measure(HessianTrace(), subject, 3, 1)
    for i, value in enumerate(x.flatten().tolist()):
        residual = 2 * value * (weight**2 * value - 1)
        exact = 4 * weight**2 * value**2 + residual
        assert means(rows, "hessian_trace")[i] == pytest.approx(exact, rel=1e-12)
        assert means(rows, "hessian_trace_residual")[i] == pytest.approx(residual, rel=1e-12)
    assert means(rows, "hessian_trace")[1] < 0


def test_residual_vanishes_at_interpolation():
    model = SMALL_NETWORKS["mlp"]().double()
    images = digits()[0][:8].double()
    subject = make_subject(model, images, output="identity")
    batch = subject.batch

    def interpolated(samples):
        found = batch(samples)
        with torch.no_grad():
            return dataclasses.replace(found, targets=model(found.inputs))

    rows = measure(HessianTrace(), dataclasses.replace(subject, batch=interpolated), 8, 2)
    assert np.abs(means(rows, "hessian_trace_residual")).max() == 0
    assert means(rows, "hessian_trace").min() > 0


def test_stated_error_of_probes_is_their_spread_over_repeats():
    model = SMALL_NETWORKS["mlp"]().double()
    images, labels = digits()
    subject = make_subject(model, images[:32], labels[:32])
    hessian, _ = loss_hessians(model, subject.batch(range(32)), "sigmoid")
    measurement = HessianTrace(group_size=4)
    repeats = 100
    found = [
        measurement.summarize(
            columns(measure(measurement, dataclasses.replace(subject, seed=seed), 32, 2))
        )[0]
        for seed in range(repeats)
    ]
    spread = np.std([e.value for e in found], ddof=1)
    stated = np.sqrt(np.mean([e.stderr_draws**2 for e in found]))
    # A standard deviation of 100 near-normal values errs by 1 / sqrt(200), the stated one by less.
    assert spread == pytest.approx(stated, rel=4 * (2 / (2 * repeats)) ** 0.5)
    error = stated / repeats**0.5
    assert np.mean([e.value for e in found]) == pytest.approx(hessian.trace().item(), abs=4 * error)


@given(scale=st.floats(0.1, 10), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_scaling_inputs_scales_the_trace_of_a_linear_network_squared(scale, seed):
    """Exact for every single probe."""
    model, images = worked_example()
    plain, scaled = (
        measure(
            HessianTrace(), make_subject(model, x, output="identity", seed=seed), 2, 1
        )
        for x in (images, scale * images)
    )  # fmt: skip
    for a, b in zip(plain, scaled, strict=True):
        assert b.value == pytest.approx(scale**2 * a.value, rel=1e-9)


@given(scale=st.floats(0.1, 10), seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_scaling_outputs_scales_the_gauss_newton_part_squared_and_the_residual_linearly(
    scale, seed
):
    """For f -> c f with labels c y the residual scales squared too, and with it the trace."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.network, self.factor = SMALL_NETWORKS["mlp"]().double(), factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * self.network(x)

    images = digits()[0][:2]
    found = []
    for factor in (1.0, scale):
        subject = make_subject(Scaled(factor), images, output="identity", seed=seed)
        batch = subject.batch(range(2))
        scaled = dataclasses.replace(batch, targets=factor * batch.targets)
        fixed = dataclasses.replace(subject, batch=lambda _, scaled=scaled: scaled)
        found.append(measure(HessianTrace(), fixed, 2, 1))
    for a, b in zip(*found, strict=True):
        assert b.value == pytest.approx(scale**2 * a.value, rel=1e-9)


def test_rows_do_not_depend_on_ranges_or_their_order():
    images, labels = digits()

    def subject() -> Subject:
        return make_subject(SMALL_NETWORKS["vit"](), images[:16], labels[:16], seed=1)

    measurement = HessianTrace(group_size=4)
    whole = timeless(measure(measurement, subject(), 16, 2))
    parts = []
    for draw in (1, 0):
        for start in (8, 12, 0, 4):
            block = Block(range(start, start + 4), range(draw, draw + 1))
            parts += timeless(measurement.measure(subject(), block))
    assert sorted(parts, key=repr) == sorted(whole, key=repr)
    found, expected = (measurement.summarize(columns(rows)) for rows in (parts, whole))
    assert repr(found) == repr(expected)


def test_batch_sizes_and_precision_only_change_rounding():
    images, labels = digits()
    model = SMALL_NETWORKS["vit"]().double()
    subject = make_subject(model, images[:8], labels[:8])
    rows = measure(HessianTrace(), subject, 8, 1)
    small = make_subject(model, images[:8], labels[:8], batch_size=3)
    single = make_subject(SMALL_NETWORKS["vit"](), images[:8], labels[:8])
    scale = max(abs(row.value) for row in rows)
    for other, tolerance in ((small, 1e-9), (single, 1e-5)):
        for a, b in zip(rows, measure(HessianTrace(), other, 8, 1), strict=True):
            assert (a.quantity, a.sample, a.group) == (b.quantity, b.sample, b.group)
            assert a.value == pytest.approx(b.value, abs=tolerance * scale)


def test_network_that_cannot_be_measured_is_refused_and_overflow_is_a_row():
    images, labels = digits()
    hard = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Hardsigmoid())
    with pytest.raises(MeasurementError, match="hardsigmoid"):
        measure(HessianTrace(), make_subject(hard, images[:2], labels[:2]), 2, 1)
    model = Square(1.0).float()
    subject = make_subject(model, torch.full((2, 1, 1, 1), 3e38), output="identity")
    rows = measure(HessianTrace(), subject, 2, 1)
    # The second derivative 2 x is above the largest float32.
    assert {row.status for row in rows} == {Status.NOT_FINITE}
    assert all(np.isnan(row.value) for row in rows)
    trace, residual = HessianTrace().summarize(columns(rows))
    assert (trace.status, residual.status) == (Status.NOT_FINITE, Status.NOT_FINITE)
    assert HessianTrace().finished(columns(rows))


def test_work_and_probes_are_counted_and_the_status_is_shared():
    images, labels = digits()
    subject = make_subject(SMALL_NETWORKS["mlp"](), images[:20], labels[:20])
    measurement = HessianTrace(group_size=8, target_relative_stderr=1e-6)
    assert measurement.alignment == 8
    trace, residual = measurement.summarize(columns(measure(measurement, subject, 20, 3)))
    assert (trace.num_samples, trace.num_rows, trace.num_probes) == (20, 60, 9)
    assert trace.forward_equivalents == 60 * measurement.forward_equivalents(None)  # type: ignore[arg-type]
    assert residual.forward_equivalents == 0
    assert trace.status is residual.status
    assert trace.status is not Status.OK


def test_settings_and_stages_are_those_of_grouped_draws():
    measurement = HessianTrace(max_samples=40, max_draws=4)
    sizes = [(len(b.samples), len(b.draws)) for b in measurement.stages(20, 100)]
    assert sizes == [(20, 2), (40, 2), (40, 4)]
    assert HessianTrace(max_draws=9, max_samples=5).key_fields() == HessianTrace().key_fields()
    assert HessianTrace(group_size=4).key_fields() != HessianTrace().key_fields()
    with pytest.raises(ValueError, match="max_draws = 1 is below"):
        HessianTrace(max_draws=1)
