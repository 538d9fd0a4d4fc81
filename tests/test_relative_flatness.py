"""Relative flatness against the double loop over the Hessian of the last layer, in float64."""

from __future__ import annotations

import copy
import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from tasks.block import Block
from tasks.measurement import MeasurementError, Output, Row, Status
from tasks.relative_flatness import RelativeFlatness

LOSSES = ("half_squared_error", "mse", "cross_entropy")
NUM_OUTPUTS = 4
# Identities in float64.
TOLERANCE = 1e-9

few = settings(max_examples=10, deadline=None)
factors = st.floats(0.2, 5)


def distilled() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = VisionTransformerDistilled(
            img_size=8,
            patch_size=4,
            in_chans=1,
            num_classes=NUM_OUTPUTS,
            embed_dim=12,
            depth=1,
            num_heads=3,
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


NETWORKS = {
    "mlp": lambda: oracles.mlp(hidden=7, outputs=NUM_OUTPUTS),
    "cnn": lambda: oracles.cnn(outputs=NUM_OUTPUTS),
    "vit": lambda: oracles.tiny_vit(num_classes=NUM_OUTPUTS),
    "distilled": distilled,
}


def relu_network(seed: int) -> nn.Sequential:
    """Bias-free ReLU network of three layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 9, bias=False),
            nn.ReLU(),
            nn.Linear(9, 6, bias=False),
            nn.ReLU(),
            nn.Linear(6, NUM_OUTPUTS, bias=False),
        ).double()


def images(count: int = 4, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def labels(count: int = 4) -> torch.Tensor:
    return torch.arange(count) % NUM_OUTPUTS


def measured(
    model: nn.Module, x: torch.Tensor, loss: str, output: Output, **changes
) -> tuple[float, list[Row]]:
    subject = oracles.make_subject(model, x, labels(len(x)), output=output, **changes)
    measurement = RelativeFlatness(loss=loss)
    rows = measurement.measure(subject, Block(range(len(x))))
    (estimate,) = measurement.summarize(oracles.columns(rows))
    return estimate.value, rows


def last_layers(model: nn.Module) -> list[str]:
    if isinstance(model, nn.Sequential):
        return [str(len(model) - 1)]
    return ["head", "head_dist"] if isinstance(model, VisionTransformerDistilled) else ["head"]


def double_loop(model: nn.Module, x: torch.Tensor, loss: str, output: Output) -> float:
    """Petzka's definition: torch's own losses, torch's own Hessian, a loop over pairs of rows."""
    y = labels(len(x))
    one_hot = nn.functional.one_hot(y, NUM_OUTPUTS).double()
    total = 0.0
    for layer in last_layers(model):
        name = f"{layer}.weight"
        weight = model.get_parameter(name).detach()

        def mean_loss(w: torch.Tensor, name: str = name) -> torch.Tensor:
            logits = torch.func.functional_call(model, {name: w}, x)
            f = torch.sigmoid(logits) if output == "sigmoid" else logits
            if loss == "cross_entropy":
                return nn.functional.cross_entropy(logits, y)
            if loss == "mse":
                return nn.functional.mse_loss(f, one_hot)
            return nn.functional.mse_loss(f, one_hot, reduction="sum") / (2 * len(x))

        # Reverse over reverse: torch.func.hessian's forward mode gives deprecation warnings.
        hessian = torch.func.jacrev(torch.func.jacrev(mean_loss))(weight)
        for i in range(NUM_OUTPUTS):
            for j in range(NUM_OUTPUTS):
                total += float(weight[i] @ weight[j] * torch.trace(hessian[i, :, j, :]))
    return total


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_closed_form_is_the_double_loop_over_the_hessian(name, loss, output):
    model = NETWORKS[name]().double().requires_grad_(False)
    value, rows = measured(model, images(), loss, output)
    assert value == pytest.approx(double_loop(model, images(), loss, output), rel=TOLERANCE)
    assert [row.sample for row in rows] == [0, 1, 2, 3]
    assert all(row.status == Status.OK and row.forward_equivalents == 1 for row in rows)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_row_is_the_value_of_its_image_alone_whatever_the_batches(loss):
    model = NETWORKS["mlp"]().double()
    _, rows = measured(model, images(), loss, "sigmoid")
    _, small = measured(model, images(), loss, "sigmoid", batch_size=3)
    for i, row in enumerate(rows):
        x = images()[[i]]
        subject = oracles.make_subject(copy.deepcopy(model), x, labels()[[i]], output="sigmoid")
        (alone,) = RelativeFlatness(loss=loss).measure(subject, Block(range(1)))
        assert row.value == pytest.approx(alone.value, rel=TOLERANCE)
        assert row.value == pytest.approx(small[i].value, rel=TOLERANCE)


def linear(*weights: list[list[float]]) -> nn.Sequential:
    model = nn.Sequential(
        nn.Flatten(), *(nn.Linear(len(w[0]), len(w), bias=False) for w in weights)
    )
    for layer, weight in zip(list(model)[1:], weights, strict=True):
        layer.weight.data = torch.tensor(weight, dtype=torch.float64)
    return model.double()


@pytest.mark.parametrize("loss", ["half_squared_error", "mse"])  # equal at two outputs
def test_worked_examples_of_one_and_two_linear_layers(loss):
    _, x = oracles.worked_example()
    first, second = [[2.0, 1, 2], [1, 0, -1]], [[1.0, 1], [0, 2]]
    for model, expected in ((linear(first), 187), (linear(first, second), 606)):
        subject = oracles.make_subject(model, x, torch.tensor([0, 1]), output="identity")
        measurement = RelativeFlatness(loss=loss)
        rows = measurement.measure(subject, Block(range(2)))
        (estimate,) = measurement.summarize(oracles.columns(rows))
        assert estimate.value == pytest.approx(expected, rel=1e-12)


def test_mse_is_two_over_the_number_of_outputs_times_the_papers_loss():
    model = NETWORKS["cnn"]().double()
    values = [measured(model, images(), loss, "sigmoid")[0] for loss in LOSSES[:2]]
    assert values[1] == pytest.approx(values[0] * 2 / NUM_OUTPUTS, rel=TOLERANCE)


def test_squared_error_of_logits_does_not_depend_on_the_labels_but_that_of_sigmoids_does():
    model, values = NETWORKS["mlp"]().double(), {}
    for output in ("identity", "sigmoid"):
        for shift in (0, 1):
            subject = oracles.make_subject(
                model, images(), (labels() + shift) % NUM_OUTPUTS, output=output
            )
            rows = RelativeFlatness().measure(subject, Block(range(4)))
            values[output, shift] = [row.value for row in rows]
    assert values["identity", 0] == values["identity", 1]
    assert values["sigmoid", 0] != pytest.approx(values["sigmoid", 1], rel=1e-3)


def test_sigmoids_far_from_their_labels_give_a_negative_value():
    """At logit 3 and label 0 the loss of a sigmoid bends down: f > 2/3."""
    model = NETWORKS["mlp"]().double()
    model[-1].bias.data[:] = 3.0
    model[-1].weight.data *= 0.1
    assert measured(model, images(), "half_squared_error", "sigmoid")[0] < 0
    assert measured(model, images(), "half_squared_error", "identity")[0] > 0
    assert measured(model, images(), "cross_entropy", "sigmoid")[0] > 0


def biased(logits: list[float]) -> tuple[nn.Module, torch.Tensor]:
    """Two outputs with these logits at the image (1, 1): weights (1, 0) and (0, 2), and biases."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double()
    model[1].weight.data = torch.tensor([[1.0, 0], [0, 2]]).double()
    model[1].bias.data = torch.tensor(logits).double() - torch.tensor([1.0, 2])
    return model, torch.ones(1, 1, 1, 2).double()


@pytest.mark.parametrize("gap", [0.0, 3.0, 30.0, 60.0, -60.0])
def test_confident_softmaxes_keep_their_digits(gap):
    """Of two classes: p (1 - p) |w_1 - w_2|^2 |phi|^2; 1 - p is below the rounding of p."""
    model, x = biased([gap, 0.0])
    p, q = 1 / (1 + math.exp(-gap)), 1 / (1 + math.exp(gap))
    value, _ = measured(model, x, "cross_entropy", "identity")
    assert value == pytest.approx(p * q * 5 * 2, rel=1e-12)


@pytest.mark.parametrize("logit", [20.0, 40.0, 60.0])
def test_saturated_sigmoids_that_are_right_keep_their_digits(logit):
    """f' = e^-z, f - y = -+e^-z and f'' = -+e^-z up to e^-z, so the curvature is 2 e^(-2 z)."""
    model, x = biased([logit, -logit])
    value, _ = measured(model, x, "half_squared_error", "sigmoid")
    assert value == pytest.approx(2 * math.exp(-2 * logit) * (1 + 4) * 2, rel=20 * math.exp(-logit))


def test_float32_networks_agree_with_float64_to_their_rounding():
    for name in NETWORKS:
        for loss in LOSSES:
            model = NETWORKS[name]()
            exact, _ = measured(copy.deepcopy(model).double(), images(), loss, "sigmoid")
            value, _ = measured(model, images(), loss, "sigmoid")
            assert value == pytest.approx(exact, rel=1e-4)


@given(st.integers(0, 99), factors)
@few
def test_scaling_the_output_scales_by_the_square(seed, c):
    model = relu_network(seed)
    before, _ = measured(model, images(), "half_squared_error", "identity")
    scaled = copy.deepcopy(model)
    scaled[5].weight.data *= c
    after, _ = measured(scaled, images(), "half_squared_error", "identity")
    assert after == pytest.approx(c**2 * before, rel=TOLERANCE)
    outside = nn.Sequential(*model, oracles.Times(c))
    after, _ = measured(outside, images(), "half_squared_error", "identity")
    assert after == pytest.approx(c**2 * before, rel=TOLERANCE)


@given(st.integers(0, 99), factors)
@few
def test_scaling_all_weights_or_the_images_of_a_bias_free_network(seed, a):
    model = relu_network(seed)
    before, _ = measured(model, images(), "half_squared_error", "identity")
    after, _ = measured(model, a * images(), "half_squared_error", "identity")
    assert after == pytest.approx(a**2 * before, rel=TOLERANCE)
    for layer in (1, 3, 5):
        model[layer].weight.data *= a
    after, _ = measured(model, images(), "half_squared_error", "identity")
    assert after == pytest.approx(a**6 * before, rel=TOLERANCE)


@given(
    st.integers(0, 99), factors, st.sampled_from(LOSSES), st.sampled_from(["sigmoid", "identity"])
)
@few
def test_symmetries_of_the_network_leave_it_unchanged(seed, a, loss, output):
    """Rescaled ReLU layers, the last included; permuted units; rescaled and rotated inputs."""
    model, x = relu_network(seed), images()
    before, _ = measured(model, x, loss, output)
    scales = torch.linspace(1, a, 9).double()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    rotation, _ = torch.linalg.qr(images(64, seed).reshape(64, 64))
    pixels = torch.linspace(1, a, 64).double()
    model[1].weight.data = scales[:, None] * model[1].weight.data / pixels @ rotation.mT
    model[3].weight.data = (a * model[3].weight.data / scales)[order]
    model[5].weight.data = model[5].weight.data[:, order] / a
    after, _ = measured(model, (x.flatten(1) * pixels @ rotation.mT).reshape(x.shape), loss, output)
    assert after == pytest.approx(before, rel=TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_data_set_twice_gives_the_same(loss):
    model, x = NETWORKS["mlp"]().double(), images()
    once, _ = measured(model, x, loss, "sigmoid")
    twice, _ = measured(model, torch.cat([x, x]), loss, "sigmoid")
    assert twice == pytest.approx(once, rel=TOLERANCE)


def test_networks_that_do_not_end_in_a_linear_layer_are_refused():
    model = nn.Sequential(*NETWORKS["mlp"](), nn.Softplus())
    with pytest.raises(MeasurementError, match="affine map of the input of a linear layer"):
        measured(model, images(), "mse", "identity")


def test_images_with_nan_are_named():
    x = images()
    x[2] = float("nan")
    for first in (0, 2):
        subject = oracles.make_subject(NETWORKS["mlp"](), x, labels())
        with pytest.raises(MeasurementError, match=r"samples \[2\]: NaN or infinite images"):
            RelativeFlatness().measure(subject, Block(range(first, 4)))


def test_another_number_of_outputs_than_classes_is_refused():
    subject = oracles.make_subject(NETWORKS["mlp"](), images(), labels())
    subject.model[-1] = nn.Linear(7, NUM_OUTPUTS + 1)
    with pytest.raises(MeasurementError, match="expected 4 outputs, one per class"):
        RelativeFlatness().measure(subject, Block(range(4)))


def test_an_overflow_is_a_row_with_its_status_and_not_an_error():
    model = linear([[1e200, 1e200], [1e200, -1e200]])
    subject = oracles.make_subject(model, torch.ones(1, 1, 1, 2).double(), output="identity")
    (row,) = RelativeFlatness().measure(subject, Block(range(1)))
    assert math.isnan(row.value)
    assert row.status == Status.NOT_FINITE
