"""NMLS against dense Jacobians through each layer alone, closed forms and scaling laws."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobian_oracles import NETWORKS, Positioned, exact_spectra, linear, network
from torch import nn

from tasks.block import Block
from tasks.layer_sensitivity import Nmls
from tasks.measurement import Estimate, MeasurementError, Row, Status, Subject
from tasks.outline import LayerOutline, Outline
from tasks.random import generator
from tasks.self_test import self_test

COUNT = 4
METHODS = ("exact", "lanczos")


def images(count: int = COUNT) -> torch.Tensor:
    return oracles.digits()[0][:count]


@functools.cache
def exact(name: str) -> dict[str, np.ndarray]:
    """sigma_1 by layer, (B,), without the images' own."""
    return {k: v[:, 0] for k, v in exact_spectra(network(name), images()).items() if k}


def subject(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> Subject:
    return oracles.make_subject(network(name).to(dtype), images(), **changes)  # type: ignore[arg-type]


def estimates(measurement: Nmls, rows: list[Row]) -> tuple[Estimate, dict[str, Estimate]]:
    whole, *layers = measurement.summarize(oracles.columns(rows))
    assert whole.quantity == "nmls"
    assert whole.layer is None
    assert {e.quantity for e in layers} == {"layer_mls"}
    return whole, {str(e.layer): e for e in layers}


def measured(model: nn.Module, x: torch.Tensor, **options: object) -> float:
    """NMLS of logits, exact rows in float64."""
    of = oracles.make_subject(copy.deepcopy(model).double(), x, output="identity")
    rows = Nmls(method="exact", **options).measure(of, Block(range(len(x))))  # type: ignore[arg-type]
    return estimates(Nmls(), rows)[0].value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_intervals_hold_the_dense_svd_of_every_layer_and_their_sum(name, method, dtype):
    of = subject(name, dtype)
    rows = Nmls(method=method).measure(of, Block(range(COUNT)))
    width = 1e-3 if method == "lanczos" else 16 * self_test(of).defect
    for sample in range(COUNT):
        *layers, total = [row for row in rows if row.sample == sample]
        assert [row.layer for row in layers] == list(exact(name))
        assert (total.quantity, total.layer) == ("nmls", None)
        truth = [exact(name)[str(row.layer)][sample] for row in layers]
        for row, sigma in zip([*layers, total], [*truth, sum(truth)], strict=True):
            assert row.status is Status.OK
            assert row.lower * (1 - 1e-13) <= sigma <= row.upper * (1 + 1e-13)
            assert row.lower <= row.value <= row.upper
            assert row.upper - row.lower <= width * row.value * (1 + 1e-9)
        assert total.value == pytest.approx(math.fsum(row.value for row in layers), rel=1e-13)
        assert total.lower == pytest.approx(math.fsum(row.lower for row in layers), rel=1e-13)


def test_total_derivatives_of_a_residual_network_are_something_else():
    """The oracle is of paths: autograd at the activation would include the skip connection."""
    model, x = network("residual"), images().double()
    rows = Nmls().measure(subject("residual"), Block(range(COUNT)))
    path = [row.value for row in rows if row.layer == "blocks.0"]
    total = []
    for image in x:
        hidden = model.stem(image.flatten()).detach()

        def rest(h: torch.Tensor) -> torch.Tensor:
            for block in model.blocks:
                h = h + block(h).tanh()
            return model.head(h).sigmoid()

        jacobian = torch.autograd.functional.jacobian(rest, hidden)
        total.append(torch.linalg.svdvals(jacobian)[0].item())
    np.testing.assert_allclose(path, exact("residual")["blocks.0"], rtol=1e-12)
    assert np.all(np.abs(np.array(total) / path - 1) > 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_closed_forms_of_linear_networks(method):
    """One layer: sigma_1 = 3. Two: ||W2 W1|| + ||W2|| = 5.999310."""
    w1 = torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, -1.0]]).double()
    w2 = torch.tensor([[1.0, 1.0], [0.0, 2.0]]).double()
    _, x = oracles.worked_example()
    for weights, expected, layers in (
        ((w1,), 3.0, {"1": 3.0}),
        ((w1, w2), 5.999310, {"1": 3.711065, "2": 2.288246}),
    ):
        of = oracles.make_subject(linear(*weights), x, output="identity")
        measurement = Nmls(method=method)
        whole, parts = estimates(measurement, measurement.measure(of, Block(range(2))))
        assert whole.value == pytest.approx(expected, abs=1e-6)
        assert {k: e.value for k, e in parts.items()} == pytest.approx(layers, abs=1e-6)
        assert whole.stderr == pytest.approx(0, abs=1e-12)
        assert whole.num_samples == 2


def test_estimates_are_means_over_images_and_the_sum_is_that_of_the_layers():
    rows = Nmls().measure(subject("mlp"), Block(range(COUNT)))
    whole, layers = estimates(Nmls(), rows)
    for name, sigma in exact("mlp").items():
        assert layers[name].value == pytest.approx(sigma.mean(), rel=1e-12)
        assert layers[name].stderr == pytest.approx(sigma.std(ddof=1) / 2, rel=1e-9)
    sums = sum(exact("mlp").values())
    assert whole.value == pytest.approx(sums.mean(), rel=1e-12)
    assert whole.stderr == pytest.approx(sums.std(ddof=1) / 2, rel=1e-9)
    assert whole.error_bound < 1e-11 * whole.value
    assert whole.forward_equivalents > 0
    assert list(layers) == list(exact("mlp"))
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    again, parts = estimates(Nmls(), shuffled)
    assert again == whole
    assert {k: parts[k] for k in layers} == layers


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_batches_or_blocks(method):
    whole = Nmls(method=method).measure(subject("vit", batch_size=4), Block(range(COUNT)))
    parts = []
    for block in (range(1), range(1, COUNT)):
        parts += Nmls(method=method).measure(subject("vit", batch_size=2), Block(block))
    for a, b in zip(whole, parts, strict=True):
        assert (a.sample, a.layer, a.quantity) == (b.sample, b.layer, b.quantity)
        assert a.value == pytest.approx(b.value, rel=1e-12)
        assert a.num_iterations == b.num_iterations


def test_every_image_and_layer_has_a_lanczos_start_of_its_own(monkeypatch):
    keys: list[tuple[int | str, ...]] = []

    def noted(*key: int | str) -> torch.Generator:
        keys.append(key)
        return generator(*key)

    monkeypatch.setattr("tasks.layer_sensitivity.generator", noted)
    Nmls(method="lanczos").measure(subject("mlp"), Block(range(COUNT)))
    assert set(keys) == {(0, "nmls", sample, layer) for sample in range(COUNT) for layer in "135"}
    assert len(keys) == COUNT * 3


def test_layers_on_constant_inputs_are_named_and_left_out():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        of = oracles.make_subject(Positioned().double(), images())
    for block, expected in ((range(2), 1), (range(2, 4), 0)):
        rows = Nmls().measure(of, Block(block))
        named = [row for row in rows if row.status is Status.CONSTANT_INPUT]
        assert [row.layer for row in named] == ["position"] * expected
    rows = Nmls().measure(of, Block(range(COUNT)))
    whole, layers = estimates(Nmls(), rows)
    assert layers["position"].status is Status.CONSTANT_INPUT
    assert math.isnan(layers["position"].value)
    assert whole.status is Status.OK
    assert whole.value == pytest.approx(layers["first"].value + layers["head"].value, rel=1e-12)


def test_a_narrow_budget_of_steps_is_said_and_the_interval_stays_valid():
    rows = Nmls(method="lanczos", max_iterations=2).measure(subject("vit"), Block(range(COUNT)))
    assert any(row.status is Status.NOT_CONVERGED for row in rows if row.layer)
    for row in rows:
        if row.layer:
            assert row.lower <= exact("vit")[row.layer][row.sample] <= row.upper
    whole, _ = estimates(Nmls(), rows)
    assert whole.status is Status.NOT_CONVERGED
    assert whole.error_bound > 1e-3 * whole.value


def test_a_network_without_layers_is_refused():
    of = oracles.make_subject(*oracles.worked_example())
    with pytest.raises(MeasurementError, match="linear or convolutional"):
        Nmls().measure(of, Block(range(2)))


def test_auto_looks_at_sizes_alone_and_notes_what_it_takes():
    def outline(num_outputs: int, features: int, layers: int, size: int = 1000) -> Outline:
        parts = [LayerOutline(f"l{k}", size, size, 1) for k in range(layers - 1)]
        head = LayerOutline("head", features, num_outputs, 1)
        return Outline({}, num_outputs, 10**6, 10**9, (*parts, head))

    deep, shallow = outline(1000, 192, 50), outline(1000, 1000, 3)
    assert "192 exact rows through 50 layers" in Nmls().note(deep)
    assert "Lanczos on 3 layers" in Nmls().note(shallow)
    assert "Lanczos" in Nmls(method="lanczos").note(deep)
    huge = outline(1000, 192, 50, size=2**30)
    assert "Lanczos" in Nmls().note(huge)
    for network_ in (deep, shallow):
        cost = {m: Nmls(method=m).forward_equivalents(network_) for m in METHODS}  # type: ignore[arg-type]
        assert Nmls().forward_equivalents(network_) == min(cost.values())
    # The memory that there is must not change the method, and with it the numbers.
    assert Nmls(memory_gib=1e-6).note(deep) == Nmls().note(deep)
    assert Nmls(memory_gib=1e-6).key_fields() == Nmls().key_fields()


def test_auto_measures_by_the_method_that_it_notes():
    few = subject("mlp")
    rows = Nmls().measure(few, Block(range(2)))
    assert {row.num_probes for row in rows} == {0}
    generator = torch.Generator().manual_seed(0)
    wide = linear(torch.randn(200, 64, generator=generator).double())
    rows = Nmls().measure(oracles.make_subject(wide, images()), Block(range(2)))
    assert {row.num_probes for row in rows} == {1}


def test_an_overflow_is_a_row_and_not_an_error():
    class Root(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z.abs().sqrt()

    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), Root()).double()
    x = torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]]).reshape(3, 1, 1, 2).double()
    for method in METHODS:
        of = oracles.make_subject(model, x, output="identity")
        rows = Nmls(method=method).measure(of, Block(range(3)))
        bad = {row.sample for row in rows if row.status is Status.NOT_FINITE}
        assert bad == {2}
        assert all(math.isnan(row.value) == (row.sample == 2) for row in rows)
        assert estimates(Nmls(), rows)[0].status is Status.NOT_FINITE


scales = st.floats(0.1, 10)
few = settings(max_examples=10, deadline=None)


@functools.cache
def relu_network(bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        sizes = ((64, 20), (20, 16), (16, 5))
        layers = [nn.Linear(*s, bias=bias, dtype=torch.float64) for s in sizes]
        return nn.Sequential(
            nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]
        ).eval()


class Scaled(nn.Module):
    """c f: a factor outside the layers."""

    def __init__(self, model: nn.Module, c: float) -> None:
        super().__init__()
        self.model, self.c = model, c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c * self.model(x)


@few
@given(scales)
def test_scaling_the_outputs_scales_nmls(c):
    base = measured(relu_network(), images())
    assert measured(Scaled(relu_network(), c), images()) == pytest.approx(c * base, rel=1e-9)


@few
@given(scales)
def test_scaling_the_images_of_a_bias_free_relu_network_changes_nothing(c):
    base = measured(relu_network(bias=False), images())
    assert measured(relu_network(bias=False), c * images().double()) == pytest.approx(
        base, rel=1e-9
    )


@few
@given(st.integers(0, 10**6))
def test_a_rotation_of_the_inputs_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator).double())
    model = copy.deepcopy(relu_network())
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight @ turn.mT)
    turned = (images().double().flatten(1) @ turn.mT).reshape(images().shape)
    assert measured(model, turned) == pytest.approx(measured(relu_network(), images()), rel=1e-9)


@few
@given(st.randoms(use_true_random=False))
def test_a_permutation_of_hidden_units_changes_nothing(random):
    order = list(range(20))
    random.shuffle(order)
    model = copy.deepcopy(relu_network())
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight[order])
        model[1].bias.copy_(model[1].bias[order])
        model[3].weight.copy_(model[3].weight[:, order])
    assert measured(model, images()) == pytest.approx(measured(relu_network(), images()), rel=1e-9)


@few
@given(scales)
def test_moving_scale_between_relu_layers_moves_it_between_layers_of_nmls(a):
    """W1 a, W2 / a: the map from the second layer's input is divided by a, all others stay."""
    model = copy.deepcopy(relu_network())
    with torch.no_grad():
        model[1].weight.mul_(a)
        model[1].bias.mul_(a)
        model[3].weight.div_(a)
    found, base = (
        estimates(
            Nmls(),
            Nmls().measure(
                oracles.make_subject(m, images(), output="identity"), Block(range(COUNT))
            ),
        )[1]
        for m in (model, copy.deepcopy(relu_network()))
    )
    for layer, factor in (("1", 1.0), ("3", 1 / a), ("5", 1.0)):
        assert found[layer].value == pytest.approx(factor * base[layer].value, rel=1e-9)


def test_duplicated_images_change_nothing():
    twice = torch.cat([images(), images()])
    assert measured(relu_network(), twice) == pytest.approx(
        measured(relu_network(), images()), rel=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_rows_say_what_they_cost_and_the_prediction_is_near(method):
    of = subject("vit")
    sizes = [LayerOutline(str(name), 1, 1, 1) for name in exact("vit")]
    sizes[-1] = LayerOutline("head", 32, 10, 1)
    predicted = Nmls(method=method).forward_equivalents(Outline({}, 10, 1, 10**9, tuple(sizes)))
    rows = Nmls(method=method).measure(of, Block(range(COUNT)))
    for row in rows:
        assert (row.forward_equivalents > 0) == (row.quantity == "nmls")
        assert (row.seconds > 0) == (row.quantity == "nmls")
    spent = [row.forward_equivalents for row in rows if row.quantity == "nmls"]
    # Lanczos may end before the 10 steps that 10 outputs can take.
    assert all(0.5 * predicted <= x <= predicted * (1 + 1e-12) for x in spent)
