"""Dense Jacobians of single images by plain autograd in float64, independent of tasks/."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from oracles import cnn, mlp, tiny_vit
from torch import nn

from tasks.measurement import Output


class Residual(nn.Module):
    """x + W2 tanh(W1 x) twice: activations feed a layer and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(64, 20), nn.Linear(20, 10)
        self.blocks = nn.ModuleList(nn.Linear(20, 20) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x)


class Positioned(nn.Module):
    """A layer on a constant input beside those on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.position, self.head = nn.Linear(64, 16), nn.Linear(3, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(x.flatten(1)) + self.position(x.new_ones(3))))


def linear(*weights: torch.Tensor) -> nn.Sequential:
    """Linear layers without biases, one after the other, on flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layers.append(layer)
    return nn.Sequential(*layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit,
    # 40 outputs of 32 features: the head is a factor of every Jacobian, and the LayerNorm in
    # front of it takes two directions away.
    "vit_wide": lambda: tiny_vit(1, num_classes=40, depth=2),
    "mlp": mlp,
    "cnn": cnn,
    "residual": Residual,
}


def network(name: str) -> nn.Module:
    """One of the networks, float64, with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return NETWORKS[name]().double().eval()


def path_jacobians(model: nn.Module, image: torch.Tensor, output: Output) -> dict[str, np.ndarray]:
    """All rows of d f / d x, as ``""``, and of every layer's J_l W_l, by module name, (N, D).

    J_l is the derivative with respect to the layer's output; its product with the layer alone is
    taken on a copy of the layer's input that nothing else hears of.
    """
    model = copy.deepcopy(model).double().eval()
    names = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    inputs: dict[str, torch.Tensor] = {}
    results: dict[str, torch.Tensor] = {}

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor):
        inputs[names[module]], results[names[module]] = args[0].detach(), result
        return result.clone()  # in-place operations behind the layer leave ``result`` alone

    handles = [module.register_forward_hook(hook) for module in names]
    x = image[None].double().clone().requires_grad_()
    logits = model(x)[0]
    for handle in handles:
        handle.remove()
    f = torch.sigmoid(logits) if output == "sigmoid" else logits
    found: dict[str, list[torch.Tensor]] = {"": []} | {name: [] for name in results}
    for y in f:
        x_gradient, *gradients = torch.autograd.grad(y, [x, *results.values()], retain_graph=True)
        found[""].append(x_gradient.flatten())
        for (name, value), gradient in zip(inputs.items(), gradients, strict=True):
            leaf = value.clone().requires_grad_()
            (alone,) = torch.autograd.grad(model.get_submodule(name)(leaf), leaf, gradient)
            found[name].append(alone.flatten())
    return {name: torch.stack(rows).detach().numpy() for name, rows in found.items()}


def exact_spectra(
    model: nn.Module, images: torch.Tensor, output: Output = "sigmoid"
) -> dict[str, np.ndarray]:
    """Singular values of all maps, by name, (B, min(N, D)) descending."""
    found = [path_jacobians(model, image, output) for image in images]
    return {
        name: np.stack([np.linalg.svd(f[name], compute_uv=False) for f in found])
        for name in found[0]
    }
