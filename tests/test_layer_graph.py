"""Gradients at layers' inputs, outputs and parameters, against plain autograd image by image."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from oracles import cnn, digits, mlp, tiny_vit
from torch import nn
from torch.nn import functional as F

from tasks.layer_graph import layer_graph
from tasks.layers import Layer, find_layers
from tasks.measurement import MeasurementError


class Residual(nn.Module):
    """x + W2 tanh(W1 x): the input of W1 also feeds the skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        return self.head(x + self.branch(x).tanh_())


class Odd(nn.Module):
    """A module called twice, two that share a weight, one on a constant, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.one, self.other = (nn.Linear(64, 64) for _ in range(3))
        self.other.weight = self.one.weight
        self.position, self.functional = nn.Linear(3, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x.flatten(1)).relu_())
        x = self.one(x) * self.other(x).sigmoid() + self.position(x.new_ones(3))
        return self.head(F.linear(x, self.functional.weight, self.functional.bias).tanh())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit, "mlp": mlp, "cnn": cnn, "residual": Residual, "odd": Odd,
}  # fmt: skip


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return NETWORKS[name]().double().eval().requires_grad_(False)


def images(count: int = 3) -> torch.Tensor:
    return digits()[0][:count].double()


def autograd(
    model: nn.Module, image: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Plain gradients of u . sigmoid(model(image)): of the image, and of every parameter."""
    model = copy.deepcopy(model).requires_grad_(True)
    x = image[None].clone().requires_grad_()
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(
        (model(x).sigmoid()[0] * u).sum(), [x, *parameters.values()], allow_unused=True
    )
    gradients = {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found[1:], strict=True)
    }
    assert found[0] is not None
    return found[0][0], gradients


def weight_gradient(layer: Layer, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Sum over positions of output gradient times input: the gradient of the layer's weight."""
    if isinstance(layer.module, nn.Linear):
        return torch.einsum("...h,...d->hd", g, x)
    m = layer.module
    patches = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride)  # type: ignore[arg-type]
    return torch.einsum("bht,bdt->hd", g.flatten(2), patches).reshape(m.weight.shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_gradient_is_plain_autograds(name: str):
    model, x = built(name), images()
    graph = layer_graph(model, x, "sigmoid", parameters=True)
    every = range(len(graph.layers))
    u = torch.randn(2, *graph.logits.shape, generator=torch.Generator().manual_seed(0)).double()
    found = graph.pull(u, images=True, inputs=every, outputs=every, others=True)
    assert found.images is not None
    covered = set(graph.others)
    for r in range(2):
        for i, image in enumerate(x):
            of_image, of_parameters = autograd(model, image, u[r, i])
            scale = found.scale[r, i]
            close(found.images[r, i] * scale, of_image)
            for p in graph.others:
                close(found.others[p][r, i] * scale, of_parameters[p])
            for k, layer in enumerate(graph.layers):
                if layer.owns_parameters:
                    g = found.outputs[k][r, i] * scale
                    weight = weight_gradient(layer, graph.inputs[k][i], g)
                    close(weight, of_parameters[f"{layer.name}.weight"])
                    covered |= {f"{layer.name}.{p}" for p, _ in layer.module.named_parameters()}
    assert covered == {p for p, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_input_gradient_goes_through_its_layer_alone(name: str):
    graph = layer_graph(built(name), images(), "identity")
    every = range(len(graph.layers))
    u = torch.randn(1, *graph.logits.shape, generator=torch.Generator().manual_seed(1)).double()
    found = graph.pull(u, inputs=every, outputs=every)
    for k, layer in enumerate(graph.layers):
        g = found.outputs[k][0]
        if isinstance(layer.module, nn.Linear):
            close(found.inputs[k][0], g @ layer.module.weight)
        else:
            m, shape = layer.module, (len(g), *layer.input_shape[1:])
            close(
                found.inputs[k][0][:, 0],
                nn.grad.conv2d_input(
                    shape, m.weight, g[:, 0], m.stride, m.padding, m.dilation, m.groups
                ),
            )


def test_a_skip_connection_is_left_out_of_the_path_gradient():
    model, x = built("residual"), images(1)
    graph = layer_graph(model, x, "identity")
    u = torch.ones(1, 1, 5).double()
    branch = [layer.name for layer in graph.layers].index("branch")
    path = graph.pull(u, inputs=[branch]).inputs[branch][0, 0]
    hidden = model.get_submodule("first")(x.flatten(1)).requires_grad_()
    after = hidden + model.get_submodule("branch")(hidden).tanh()
    (total,) = torch.autograd.grad(model.get_submodule("head")(after).sum(), hidden)
    skip = model.get_submodule("head").weight.sum(0)  # type: ignore[union-attr,operator]
    close(path, total - skip)
    assert (path - total).norm() > 0.1 * total.norm()


def test_odd_uses_of_modules_are_told_apart():
    layers, constant = find_layers(built("odd"), images(1))
    assert [layer.name for layer in layers] == ["twice", "twice#2", "one", "other", "head"]
    assert [layer.owns_parameters for layer in layers] == [False, False, False, False, True]
    assert constant == ("position",)


def test_windows_stay_with_their_image():
    model = timm.create_model("maxvit_rmlp_pico_rw_256", num_classes=4, img_size=64).eval()
    model.requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = layer_graph(model, x, "identity")
    alone = layer_graph(model, x[1:], "identity")
    folded = [k for k, layer in enumerate(together.layers) if layer.input_shape[0] > 1]
    assert folded, "expected layers that see windows in their batch dimension"
    assert together.constant, "expected relative-position networks on constant inputs"
    u = torch.ones(1, 2, 4).double()
    both, one = together.pull(u, inputs=folded), alone.pull(u[:, 1:], inputs=folded)
    for k in folded:
        scaled = both.inputs[k][0, 1] * both.scale[0, 1], one.inputs[k][0, 0] * one.scale[0, 0]
        torch.testing.assert_close(*scaled, rtol=1e-3, atol=1e-5 * scaled[0].abs().max().item())


def test_the_gram_operator_is_the_product_of_a_layers_rows():
    graph = layer_graph(built("vit"), images(2), "sigmoid")
    rows = torch.eye(10).double()[:, None].expand(10, 2, 10)
    u = torch.randn(2, 10, generator=torch.Generator().manual_seed(2)).double()
    for k in (0, 3, len(graph.layers) - 1):
        found = graph.pull(rows, inputs=[k])
        a = (found.inputs[k].flatten(2) * found.scale[..., None]).transpose(0, 1)
        close(graph.gram(k)(u), torch.einsum("bnd,bmd,bm->bn", a, a, u))


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_the_gram_operator_of_a_tiny_or_huge_jacobian_stays_in_float32(size: float):
    """Jacobians fit float32, their squares do not."""
    plain, scaled = mlp().eval(), mlp().eval()
    with torch.no_grad():
        for parameter in scaled[-1].parameters():
            parameter *= size
    u = torch.randn(2, 10, generator=torch.Generator().manual_seed(2)).double()
    expected = layer_graph(plain, images(2).float(), "identity").gram(0)(u) * size**2
    found = layer_graph(scaled, images(2).float(), "identity").gram(0)(u)
    torch.testing.assert_close(found / size**2, expected / size**2, rtol=1e-4, atol=1e-5)


def test_saturated_outputs_do_not_underflow():
    model = cnn().eval().requires_grad_(False)
    model[-1].bias += 80.0  # slopes near 1e-35: their squares and products vanish in float32
    graph = layer_graph(model, images(1).float(), "sigmoid")
    found = graph.pull(torch.ones(1, 1, 10), inputs=[0])
    reference = layer_graph(model.double(), images(1), "sigmoid").pull(
        torch.ones(1, 1, 10), inputs=[0]
    )
    norms = [(g.inputs[0].double() * g.scale[0, 0]).norm().item() for g in (found, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert 0 < norms[0] < 1e-30


def test_a_network_whose_forward_varies_is_refused():
    class Varying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(64, 5), nn.Linear(64, 5), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x = x.flatten(1)
            return self.a(x) + self.b(x) if self.calls == 1 else self.a(x)

    with pytest.raises(MeasurementError, match="expected 2 calls"):
        layer_graph(Varying().double().requires_grad_(False), images(), "identity")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding of float64, relative to the largest entry."""
    size = expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * size + 1e-300)
