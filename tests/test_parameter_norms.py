"""Per-image gradient norms of every parameter, against plain autograd image by image."""

from collections.abc import Callable

import pytest
import timm
import torch
from oracles import cnn, digits, make_subject, mlp, tiny_vit
from test_layer_graph import Odd, Residual, autograd
from torch import nn
from torch.nn import functional as F

from tasks.layer_graph import layer_graph
from tasks.measurement import MeasurementError
from tasks.parameter_norms import check_coverage, parameter_norms


def convolutions() -> nn.Module:
    """Grouped, strided, dilated, unevenly padded and 'same' convolutions; one without bias."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=(2, 1), bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, (3, 5), groups=4, padding="same"),
        nn.GELU(),
        nn.Conv2d(12, 6, 3, stride=2, dilation=2, groups=2),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def wide() -> nn.Module:
    """Few positions and many channels: the case of the Gram matrices."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 4, stride=4), nn.Flatten(2), nn.Linear(4, 8), nn.Tanh(), _Swap(),
        nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 96), nn.Flatten(), nn.Linear(768, 5),
    )  # fmt: skip


class _Swap(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mT


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit, "mlp": mlp, "cnn": cnn, "residual": Residual, "odd": Odd,
    "convolutions": convolutions, "wide": wide,
}  # fmt: skip


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = NETWORKS[name]().eval()
        model(digits()[0][:1])  # lazy layers
    return model.double().requires_grad_(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_are_plain_autograds(name: str):
    model, x = built(name), digits()[0][:3].double()
    graph = layer_graph(model, x, "sigmoid", parameters=True)
    u = torch.randn(3, *graph.logits.shape, generator=torch.Generator().manual_seed(0)).double()
    found = parameter_norms(graph, u, at_once=2)
    for r in range(3):
        for i, image in enumerate(x):
            _, gradients = autograd(model, image, u[r, i])
            norms = {n: g.square().sum().item() for n, g in gradients.items()}
            total = sum(norms.values())
            assert found.total[r, i].item() == pytest.approx(total, rel=1e-9)
            for n in graph.others:
                assert found.others[n][r, i].item() == pytest.approx(norms[n], rel=1e-9, abs=1e-30)
            for k, layer in enumerate(graph.layers):
                weight = found.weights[r, k, i].item()
                if layer.owns_parameters:
                    assert weight == pytest.approx(norms[f"{layer.name}.weight"], rel=1e-9)
                    bias = norms.get(f"{layer.name}.bias", 0.0)
                    assert found.biases[r, k, i].item() == pytest.approx(bias, rel=1e-9, abs=1e-30)
                else:
                    assert weight != weight


@pytest.mark.parametrize("name", ["convolutions", "wide", "vit"])
def test_positions_are_bounded_as_the_theory_says(name: str):
    """||dW||^2 <= T sum_t ||g_t||^2 ||p_t||^2, with equality of both for one position."""
    model, x = built(name), digits()[0][:2].double()
    graph = layer_graph(model, x, "identity", parameters=True)
    u = torch.ones(1, *graph.logits.shape).double()
    found = parameter_norms(graph, u)
    for k, layer in enumerate(graph.layers):
        each, weight = found.per_position[0, k], found.weights[0, k]
        assert (weight <= layer.positions * each * (1 + 1e-9)).all()
        if layer.positions == 1:
            torch.testing.assert_close(weight, each, rtol=1e-12, atol=0)
            sums = found.outputs[0, k] * graph.inputs[k].square().flatten(1).sum(1)
            torch.testing.assert_close(weight, sums, rtol=1e-9, atol=0)


def test_a_basis_sums_to_the_whole_jacobian_and_random_signs_to_it_on_average():
    model, x = built("mlp"), digits()[0][:2].double()
    graph = layer_graph(model, x, "sigmoid", parameters=True)
    basis = torch.eye(10).double()[:, None].expand(10, 2, 10)
    exact = parameter_norms(graph, basis, at_once=10).total.sum(0)
    signs = torch.tensor(
        [[1.0 if (code >> bit) & 1 else -1.0 for bit in range(10)] for code in range(1024)]
    )
    mean = parameter_norms(
        graph, signs.double()[:, None].expand(1024, 2, 10), at_once=128
    ).total.mean(0)
    torch.testing.assert_close(mean, exact, rtol=1e-9, atol=0)


def test_a_network_without_layers_has_norms_too():
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(64)).double().requires_grad_(False)
    graph = layer_graph(model, digits()[0][:2].double(), "identity", parameters=True)
    found = parameter_norms(graph, torch.ones(1, 2, 64).double())
    assert found.total.shape == (1, 2)
    assert (found.total > 0).all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128s", "repvit_m0_9"])
def test_real_architectures_are_covered(name: str):
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    check_coverage(make_subject(model, x))


def test_a_weight_used_behind_its_modules_back_is_found_out():
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x.flatten(1))
            return self.head(F.linear(x, self.layer.weight).tanh())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        subject = make_subject(Reused().double(), digits()[0][:1])
    with pytest.raises(MeasurementError, match=r"'layer\.weight'"):
        check_coverage(subject)


class Opposed(nn.Module):
    """Tokens in pairs with opposite signs, so that almost equal pairs leave almost no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(128, 128, bias=False), nn.Linear(128, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.tanh(self.layer(x[:, 0]))
        return self.head(z[:, ::2].sum(1) - z[:, 1::2].sum(1))


def test_gram_matrices_keep_the_digits_of_positions_that_cancel():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Opposed().eval().requires_grad_(False), torch.randn(3, 1, 8, 128)
        x[:, :, 1::2] = x[:, :, ::2] + 1e-4 * torch.randn(3, 1, 4, 128)
    ones = torch.ones(1, 3, 3, dtype=torch.float64)
    found, true = (
        parameter_norms(
            layer_graph(model.to(dtype), x.to(dtype), "identity", parameters=True), ones
        ).weights[0, 0]
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(found, true, rtol=0.02, atol=0)


def test_a_first_image_without_finite_logits_is_not_taken_for_a_gradient_that_is_not_covered():
    x = digits()[0][:1].clone()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(MeasurementError, match="NaN") as found:
        check_coverage(make_subject(mlp(), x))
    assert "coverage" not in str(found.value)


def test_a_gradient_that_cancels_whole_is_covered():
    """f = w x_1 - w x_2 at equal tokens: nothing but rounding is left of the gradient."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.layer(x[:, 0])
            return tokens[:, 0] / 3 + tokens[:, 1] / 7 - tokens[:, 2] * (1 / 3 + 1 / 7)

    image = digits()[0][:1, :, :1].expand(1, 1, 8, 8).double()
    check_coverage(make_subject(Difference().double(), image))
