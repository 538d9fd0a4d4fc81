"""Adaptive sharpness: exact values, reproducible draws, exact restoration."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import columns, digits, make_subject, mlp, tiny_vit, worked_example
from torch import nn

from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.block import Block
from tasks.measurement import MeasurementError, Row, Status, Subject
from tasks.random import generator


def measure(measurement: AdaptiveSharpness, subject: Subject, samples: int, draws: int) -> list:
    return measurement.measure(subject, Block(range(samples), range(draws)))


def estimate(measurement: AdaptiveSharpness, rows: list[Row]):
    return measurement.summarize(columns(rows))[0]


def timeless(rows: list[Row]) -> list[Row]:
    return [dataclasses.replace(row, seconds=0.0) for row in rows]


def scaled_hessian_diagonal_sum(model: nn.Module, subject: Subject, samples: range) -> float:
    """sum_k H_kk theta_k**2 of the loss of Eq. 1, one Hessian-vector product per parameter.

    Independent of tasks/: the diagonal of the Hessian with respect to s in theta (1 + s).
    """
    batch = subject.batch(samples)
    parameters = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]

    def loss(s: torch.Tensor) -> torch.Tensor:
        parts = s.split(sizes)
        scaled = {
            name: parameter * (1 + part.view_as(parameter))
            for (name, parameter), part in zip(parameters.items(), parts, strict=True)
        }
        outputs = torch.func.functional_call(model, scaled, (batch.inputs.clone(),))
        outputs = outputs.sigmoid() if subject.output == "sigmoid" else outputs
        return (outputs - batch.targets).square().sum() / (2 * len(samples))

    s = torch.zeros(sum(sizes), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(s), s, create_graph=True)
    total = 0.0
    for rows in torch.eye(len(s), dtype=torch.float64).split(256):
        (columns_of_h,) = torch.autograd.grad(
            gradient, s, rows, retain_graph=True, is_grads_batched=True
        )
        total += (columns_of_h * rows).sum().item()
    return total


def small_cnn() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(24, 10),
        ]  # fmt: skip
        return nn.Sequential(*layers).eval()


SMALL_NETWORKS = {
    "mlp": functools.partial(mlp, hidden=6),
    "cnn": small_cnn,
    "vit": functools.partial(tiny_vit, patch_size=4, embed_dim=8, depth=1, num_heads=2),
}


@pytest.mark.parametrize("method", ["antithetic", "one_sided", "authors"])
@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_linear_network_has_expectation_59_at_every_rho(method, rho):
    model, images = worked_example()
    subject = make_subject(model, images.repeat(50, 1, 1, 1), output="identity")
    measurement = AdaptiveSharpness(method=method, rho=rho)
    rows = measure(measurement, subject, 100, 50)
    result = estimate(measurement, rows)
    assert result.value == pytest.approx(59, abs=4 * result.stderr)
    if method == "antithetic":
        assert result.stderr < 0.05 * 59


def test_two_linear_layers_tend_to_236():
    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(worked_example()[0].weight.detach())
            self.second = nn.Parameter(torch.tensor([[1.0, 1.0], [0.0, 2.0]]).double())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.first.mT @ self.second.mT

    images = worked_example()[1].repeat(200, 1, 1, 1)
    subject = make_subject(TwoLayers(), images, output="identity")
    measurement = AdaptiveSharpness(rho=1e-3)
    result = estimate(measurement, measure(measurement, subject, 400, 64))
    assert result.value == pytest.approx(236, abs=4 * result.stderr)
    assert result.stderr < 0.05 * 236


@pytest.mark.parametrize(
    ("name", "output", "num_draws"),
    [
        ("mlp", "identity", 64),
        ("mlp", "sigmoid", 128),
        ("cnn", "identity", 128),
        ("vit", "identity", 256),
    ],
)
def test_small_rho_limit_is_the_weighted_hessian_diagonal(name, output, num_draws):
    model = SMALL_NETWORKS[name]().double()
    images, labels = digits()
    subject = make_subject(model, images[:8], labels[:8], output=output)
    exact = scaled_hessian_diagonal_sum(model, subject, range(8))
    # At 1e-3 a few of the CNN's ReLU inputs still change sign under noise, and each kink counts as
    # much as the curvature; the sum over kinks vanishes only once rho is below them all.
    measurement = AdaptiveSharpness(rho=1e-5, group_size=2)
    result = estimate(measurement, measure(measurement, subject, 8, num_draws))
    # The images are the same, so only draws err.
    assert result.value == pytest.approx(exact, abs=4 * result.stderr_draws)
    assert result.stderr_draws < 0.1 * abs(exact)


def test_one_sided_and_antithetic_estimate_the_same_number():
    images, labels = digits()
    subject = make_subject(SMALL_NETWORKS["vit"]().double(), images[:64], labels[:64])
    a, b = (
        estimate(measurement, measure(measurement, subject, 64, 32))
        for measurement in (
            AdaptiveSharpness(rho=0.2),
            AdaptiveSharpness(rho=0.2, method="one_sided", group_size=4),
        )
    )
    assert a.value == pytest.approx(b.value, abs=4 * np.hypot(a.stderr_draws, b.stderr_draws))


@given(scale=st.floats(0.1, 10), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_scaling_the_outputs_scales_the_antithetic_value_of_a_linear_network_squared(scale, seed):
    """Exact for every single draw, whatever the targets: f is linear in theta."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.linear, self.factor = worked_example()[0], factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * self.linear(x)

    images = worked_example()[1]
    plain, scaled = (
        AdaptiveSharpness().measure(
            make_subject(Scaled(factor), images, output="identity", seed=seed), Block(range(2))
        )
        for factor in (1.0, scale)
    )
    for a, b in zip(plain[:2], scaled[:2], strict=True):
        assert b.value == pytest.approx(scale**2 * a.value, rel=1e-9, abs=1e-11 * (1 + scale))


def test_a_row_is_the_loss_change_under_the_draw_of_its_key():
    images, labels = digits()
    model = SMALL_NETWORKS["vit"]()
    subject = make_subject(model, images[:24], labels[:24], seed=7)
    measurement = AdaptiveSharpness(group_size=4, rho=0.05)
    rows = measurement.measure(subject, Block(range(8, 16), range(3, 4)))
    for row in rows:
        draw_key = (7, "adaptive_sharpness", row.sample // 4, 3)
        assert (row.group, row.draw) == (row.sample // 4, 3)
        losses = []
        for sign in (0, 1, -1):
            noisy, noise = copy.deepcopy(model).double(), generator(*draw_key)
            sizes = [-(-p.numel() // 16) * 16 for p in model.parameters()]
            parts = torch.randn(sum(sizes), generator=noise).double().split(sizes)
            for parameter, part in zip(noisy.parameters(), parts, strict=True):
                part = part[: parameter.numel()].view_as(parameter)
                parameter.data += sign * 0.05 * parameter.data * part
            output = noisy(images[row.sample : row.sample + 1].double()).sigmoid()[0]
            losses.append((output - torch.eye(10)[labels[row.sample]]).square().sum().item())
        # float32 rounding of a loss near 2: a few times 1e-7.
        assert row.loss_change_plus == pytest.approx(losses[1] - losses[0], abs=3e-6)
        assert row.loss_change_minus == pytest.approx(losses[2] - losses[0], abs=3e-6)
        both = row.loss_change_plus + row.loss_change_minus
        assert row.value == pytest.approx(both / (2 * 0.05**2), rel=1e-12)


def test_rows_do_not_depend_on_ranges_or_their_order():
    images, labels = digits()

    def subject() -> Subject:
        return make_subject(SMALL_NETWORKS["vit"](), images[:32], labels[:32], seed=1)

    measurement = AdaptiveSharpness(group_size=4)
    whole = timeless(measure(measurement, subject(), 32, 2))
    other, parts = subject(), []
    for draw in (1, 0):
        for start in (16, 24, 0, 8):
            block = Block(range(start, start + 8), range(draw, draw + 1))
            parts += timeless(measurement.measure(other, block))
    assert sorted(parts, key=repr) == sorted(whole, key=repr)
    found, expected = (measurement.summarize(columns(rows)) for rows in (parts, whole))
    assert repr(found) == repr(expected)  # every bit, and NaN equals NaN


def test_ranges_inside_a_group_and_other_batch_sizes_only_change_rounding():
    images, labels = digits()
    model = SMALL_NETWORKS["vit"]().double()
    measurement = AdaptiveSharpness(group_size=8)
    a = measurement.measure(make_subject(model, images[:16], labels[:16]), Block(range(16)))
    small = make_subject(model, images[:16], labels[:16], batch_size=3)
    b = measurement.measure(small, Block(range(5))) + measurement.measure(
        small, Block(range(5, 16))
    )
    key = lambda row: (row.quantity, row.sample)  # noqa: E731
    for x, y in zip(sorted(a, key=key), sorted(b, key=key), strict=True):
        assert (x.sample, x.group, x.draw) == (y.sample, y.group, y.draw)
        assert x.value == pytest.approx(y.value, rel=1e-9, abs=1e-11)


def test_cached_unperturbed_losses_change_no_bit():
    images, labels = digits()
    subject = make_subject(SMALL_NETWORKS["vit"](), images[:16], labels[:16])
    measurement = AdaptiveSharpness()
    second = Block(range(16), range(1, 2))
    measurement.measure(subject, Block(range(16)))
    warm = timeless(measurement.measure(subject, second))
    subject.cache.clear()
    assert timeless(measurement.measure(subject, second)) == warm


@pytest.mark.parametrize("failing_call", [None, 2, 5])
def test_weights_are_bit_identical_afterwards_also_after_an_error(failing_call):
    images, labels = digits()
    model = SMALL_NETWORKS["vit"]()
    subject = make_subject(model, images[:16], labels[:16])
    before = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    calls = 0

    def fail(module: nn.Module, inputs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail)
    if failing_call is None:
        AdaptiveSharpness().measure(subject, Block(range(16)))
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            AdaptiveSharpness().measure(subject, Block(range(16)))
    handle.remove()
    for name, value in model.state_dict().items():
        pointer, kept = before[name]
        assert value.data_ptr() == pointer
        assert torch.equal(value, kept)


def test_nan_of_the_unperturbed_network_names_the_sample():
    images, labels = digits()
    images = images[:8].clone()
    images[5] = float("nan")
    subject = make_subject(SMALL_NETWORKS["vit"](), images, labels[:8])
    with pytest.raises(MeasurementError, match="sample 5"):
        AdaptiveSharpness().measure(subject, Block(range(8)))


@pytest.mark.parametrize("output", ["identity", "sigmoid"])
def test_overflow_under_noise_is_a_row_with_a_status_and_makes_the_estimate_nan(output):
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    model[1].weight.data.fill_(3e38)  # overflows from 13 % more on
    subject = make_subject(model, torch.ones(16, 1, 1, 1), output=output)
    measurement = AdaptiveSharpness(rho=1.0, group_size=1)
    rows = measurement.measure(subject, Block(range(16)))
    bad = [row for row in rows if row.status is Status.NOT_FINITE]
    assert 0 < len(bad) <= 16
    assert all(np.isnan(row.value) for row in bad)
    assert len([row for row in rows if row.quantity == "adaptive_sharpness"]) == 16
    result = estimate(measurement, rows)
    assert result.status is Status.NOT_FINITE
    assert np.isnan(result.value)
    assert measurement.finished(columns(rows))


def test_mean_squared_error_is_reported_beside_the_estimate():
    images, labels = digits()
    model = SMALL_NETWORKS["mlp"]().double()
    subject = make_subject(model, images[:40], labels[:40])
    measurement = AdaptiveSharpness()
    rows = measure(measurement, subject, 40, 2)
    error = measurement.summarize(columns(rows))[1]
    targets = nn.functional.one_hot(labels[:40], 10)
    exact = (model(images[:40].double()).sigmoid() - targets).square().sum(1)
    assert (error.quantity, error.num_samples, error.num_rows) == ("squared_error", 40, 40)
    assert error.value == pytest.approx(exact.mean().item(), rel=1e-12)
    assert error.stderr == pytest.approx(exact.std().item() / 40**0.5, rel=1e-12)


def test_work_is_counted_in_forwards_and_draws():
    images, labels = digits()
    subject = make_subject(SMALL_NETWORKS["vit"](), images[:20], labels[:20])
    for method, signs in (("antithetic", 2), ("one_sided", 1)):
        measurement = AdaptiveSharpness(method=method, group_size=8)
        sharpness, error = measurement.summarize(columns(measure(measurement, subject, 20, 3)))
        assert (sharpness.num_samples, sharpness.num_rows) == (20, 60)
        assert sharpness.num_probes == 9  # three groups, the last of four images
        assert sharpness.forward_equivalents == signs * 60
        assert error.forward_equivalents == 20
