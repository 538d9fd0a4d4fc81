"""Derivatives along a weight direction: against finite differences and dense Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curvature import SMALL_NETWORKS, TwoLayers, flat, loss_hessians, random_direction
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import digits, make_subject, mlp, tiny_vit, worked_example
from torch import nn

from tasks.directional import directional, quadratic_forms
from tasks.measurement import Batch, MeasurementError


def along(model: nn.Module, images: torch.Tensor, output: str, direction: dict, t: float):
    """Outputs at theta + t v, by copying the weights."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: p + t * direction[name] for name, p in kept.items()}
    with torch.no_grad():
        logits = torch.func.functional_call(model, moved, (images.clone(),))
    return logits.sigmoid() if output == "sigmoid" else logits


def differences(model: nn.Module, images: torch.Tensor, output: str, direction: dict, h: float):
    """First and second derivative at t = 0 by central differences of fourth order."""
    a, b, c, d, e = (along(model, images, output, direction, k * h) for k in (-2, -1, 0, 1, 2))
    return (a - 8 * b + 8 * d - e) / (12 * h), (-a + 16 * b - 30 * c + 16 * d - e) / (12 * h * h)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("output", ["identity", "sigmoid"])
@pytest.mark.parametrize("name", [*SMALL_NETWORKS, "deep vit"])
def test_derivatives_are_the_limits_of_finite_differences(name, output):
    model = (tiny_vit() if name == "deep vit" else SMALL_NETWORKS[name]()).double().eval()
    model.requires_grad_(False)
    images = digits()[0][:5].double()
    direction = random_direction(model)
    found = directional(model, images, output, direction)
    # Small steps for the CNN, whose kinks must stay out of reach. A difference of second order
    # loses eps / h^2 of the output to rounding, one of first order eps / h.
    h = 1e-4 if name == "cnn" else 1e-3
    first, second = differences(model, images, output, direction, h)
    assert found.jacobian.shape == found.curvature.shape == (5, 10)
    assert close(found.jacobian, first, 1e-8)
    assert close(found.curvature, second, 1e-6 if name == "cnn" else 1e-7)
    assert torch.equal(found.logits, model(images.clone()))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(12), nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True)]
)
def test_normalisation_layers_are_differentiated_right(norm):
    """Three derivatives in t, and nested forward mode, are off by half on two of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 72), nn.Tanh(), nn.Unflatten(1, (6, 12)), norm,
            nn.Flatten(), nn.Linear(72, 4),
        ).double().eval()  # fmt: skip
        images = torch.randn(3, 1, 3, 4).double()
    direction = random_direction(model)
    found = directional(model, images, "identity", direction)
    first, second = differences(model, images, "identity", direction, 2e-4)
    assert close(found.jacobian, first, 1e-8)
    assert close(found.curvature, second, 1e-6)


@pytest.mark.parametrize("output", ["identity", "sigmoid"])
@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_quadratic_forms_are_those_of_the_dense_hessian_of_each_image(name, output):
    model = SMALL_NETWORKS[name]().double()
    images, labels = digits()
    subject = make_subject(model, images[:3], labels[:3], output=output, batch_size=2)
    direction = random_direction(model, seed=1)
    forms = quadratic_forms(subject, subject.batch(range(3)), direction)
    v = flat(direction)
    for i in range(3):
        hessian, gauss_newton = loss_hessians(model, subject.batch([i]), output)
        assert forms.gauss_newton[i] == pytest.approx((v @ gauss_newton @ v).item(), rel=1e-9)
        whole = (v @ hessian @ v).item()
        scale = forms.gauss_newton[i] + abs(forms.residual[i])
        assert forms.gauss_newton[i] + forms.residual[i] == pytest.approx(whole, abs=1e-9 * scale)


# torch scripts its forward-mode rules at first use, and warns itself about it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_loss_hessian_agrees_with_torch_func_hessian():
    model = mlp(hidden=3).double()
    images, labels = digits()
    subject = make_subject(model, images[:2], labels[:2])
    direction = random_direction(model, seed=2)
    batch = subject.batch(range(2))

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = torch.func.functional_call(model, weights, (batch.inputs,)).sigmoid()
        return (outputs - batch.targets).square().sum() / 2

    blocks = torch.func.hessian(loss)({k: p.detach() for k, p in model.named_parameters()})
    expected = 0.0
    for a, va in direction.items():
        for b, vb in direction.items():
            block = blocks[a][b].reshape(va.numel(), vb.numel())
            expected += (va.reshape(-1) @ block @ vb.reshape(-1)).item()
    forms = quadratic_forms(subject, batch, direction)
    assert (forms.gauss_newton + forms.residual).sum() == pytest.approx(expected, rel=1e-9)


def test_linear_network_has_no_curvature_and_the_product_of_its_direction():
    model, images = worked_example()
    direction = {"weight": torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]).double()}
    found = directional(model, images, "identity", direction)
    assert torch.equal(found.curvature, torch.zeros(2, 2).double())
    assert close(found.jacobian, images.flatten(1) @ direction["weight"].mT, 1e-12)


def test_two_linear_layers_have_twice_the_product_of_their_directions():
    model, images = TwoLayers().eval(), worked_example()[1]
    v = random_direction(model)
    found = directional(model, images, "identity", v)
    assert close(found.curvature, 2 * images.flatten(1) @ v["first"].mT @ v["second"].mT, 1e-12)


@given(scale=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]))
@settings(max_examples=20, deadline=None)
def test_curvature_is_quadratic_in_the_direction(scale, sign):
    model = SMALL_NETWORKS["vit"]().double().requires_grad_(False)
    images = digits()[0][:2].double()
    direction = random_direction(model)
    one = directional(model, images, "sigmoid", direction)
    other = directional(
        model, images, "sigmoid", {k: sign * scale * v for k, v in direction.items()}
    )
    assert close(other.jacobian, sign * scale * one.jacobian, 1e-9)
    assert close(other.curvature, scale**2 * one.curvature, 1e-9)


def test_an_image_has_the_same_derivatives_in_every_batch():
    model = SMALL_NETWORKS["cnn"]().double().requires_grad_(False)
    images = digits()[0][:6].double()
    direction = random_direction(model)
    together = directional(model, images, "sigmoid", direction)
    for i in range(6):
        alone = directional(model, images[i : i + 1], "sigmoid", direction)
        assert close(alone.jacobian[0], together.jacobian[i], 1e-9)
        assert close(alone.curvature[0], together.curvature[i], 1e-9)


@pytest.mark.parametrize("bias", [-30.0, 30.0])
def test_saturated_sigmoids_keep_their_digits_in_float32(bias):
    model, images = worked_example(torch.float32)
    shifted = nn.Sequential(model, nn.Linear(2, 2)).requires_grad_(False)
    shifted[1].weight.copy_(torch.eye(2))
    shifted[1].bias.fill_(bias)
    direction = random_direction(shifted)
    found = directional(shifted, images, "sigmoid", direction)
    doubled = {name: part.double() for name, part in direction.items()}
    exact = directional(shifted.double(), images.double(), "sigmoid", doubled)
    # The slope exp(-|z|) turns an error of z, here 1e-6 after rounding 2^-23 of 40, into its own.
    for a, b in ((found.jacobian, exact.jacobian), (found.curvature, exact.curvature)):
        assert ((a - b).abs() <= 3e-5 * b.abs()).all()
        assert (b != 0).all()


def test_float32_is_accurate_to_the_rounding_of_the_network():
    model = tiny_vit().requires_grad_(False)
    images, direction = digits()[0][:4], random_direction(tiny_vit())
    found = directional(model, images, "sigmoid", direction)
    doubled = {name: part.double() for name, part in direction.items()}
    exact = directional(model.double(), images.double(), "sigmoid", doubled)
    assert close(found.jacobian, exact.jacobian, 2e-5)
    assert close(found.curvature, exact.curvature, 2e-5)


def test_tied_weights_move_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x.flatten(1)))

    model, images = Tied().double().eval(), worked_example()[1]
    v = {"a.weight": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()}
    found = directional(model, images, "identity", v)
    expected = 2 * images.flatten(1) @ v["a.weight"].mT @ v["a.weight"].mT
    assert close(found.curvature, expected, 1e-12)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: torch.Tensor) -> torch.Tensor:
        return 2 * g


class UsesDoubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(self.linear(x.flatten(1))).square()


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Hardsigmoid()), "aten::hardsigmoid"),
        (UsesDoubled(), "Doubled"),
    ],
)
def test_operations_without_the_derivatives_are_named_and_weights_stay(model, named):
    images = digits()[0][:2]
    model = model.eval().requires_grad_(False)
    before = {k: (p, p.data_ptr(), p.clone()) for k, p in model.named_parameters()}
    with pytest.raises(MeasurementError, match=named):
        directional(model, images, "identity", random_direction(model))
    for name, parameter in model.named_parameters():
        kept, pointer, value = before[name]
        assert parameter is kept
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)


def test_logits_that_ignore_the_weights_and_other_shapes_are_refused():
    class Detached(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1)).detach()

    images, labels = digits()
    model = Detached(64, 10)
    with pytest.raises(MeasurementError, match="do not depend on the weights"):
        directional(model, images[:2], "identity", random_direction(model))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    subject = make_subject(model, images[:2], labels[:2])
    batch = subject.batch(range(2))
    narrow = Batch(batch.inputs, batch.targets[:, :1], batch.samples)
    with pytest.raises(MeasurementError, match="expected 1 outputs"):
        quadratic_forms(subject, narrow, random_direction(model))


def test_not_finite_images_are_named():
    images, labels = digits()
    images = images[:4].clone()
    images[2] = float("nan")
    subject = make_subject(SMALL_NETWORKS["mlp"](), images, labels[:4], batch_size=2)
    with pytest.raises(MeasurementError, match=r"samples \[2\]"):
        quadratic_forms(subject, subject.batch(range(4)), random_direction(subject.model))


def test_an_unrelated_error_passes_through():
    class Failing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = super().forward(x.flatten(1))
            result.register_hook(self.fail)
            return result

        @staticmethod
        def fail(_: torch.Tensor) -> None:
            raise RuntimeError("can't allocate memory")

    model = Failing(64, 10)
    with pytest.raises(RuntimeError, match="can't allocate"):
        directional(model, digits()[0][:2], "identity", random_direction(model))
    assert np.all([p.grad is None for p in model.parameters()])
