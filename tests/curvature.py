"""Networks and dense float64 references for tests of second derivatives in the weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from oracles import mlp, tiny_vit, worked_example
from torch import nn

from tasks.measurement import Batch, Output


def small_cnn() -> nn.Module:
    """Batch norm off the identity, in-place ReLU, max-pooling."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 10),
        ).eval()  # fmt: skip


SMALL_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": functools.partial(mlp, hidden=6),
    "cnn": small_cnn,
    "vit": functools.partial(tiny_vit, patch_size=4, embed_dim=8, depth=1, num_heads=2),
}


class TwoLayers(nn.Module):
    """f = W_2 W_1 x without biases: S = 304 and S_adaptive = 236 on the worked example's images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(worked_example()[0].weight.detach())
        self.second = nn.Parameter(torch.tensor([[1.0, 1.0], [0.0, 2.0]]).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.first.mT @ self.second.mT


class Square(nn.Module):
    """f = w^2 x with one weight: curved, so that the label matters."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.square() * x.flatten(1)


def loss_hessians(
    model: nn.Module, batch: Batch, output: Output
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hessian (m, m) of mean_i |f_i - y_i|^2 / 2 in the flat weights, and its Gauss-Newton part.

    Independent of tasks/: plain double backward on flat leaves, row after row.
    """
    parameters = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).requires_grad_()
    weights = {
        name: part.view_as(parameter)
        for (name, parameter), part in zip(parameters.items(), flat.split(sizes), strict=True)
    }
    logits = torch.func.functional_call(model, weights, (batch.inputs.clone(),))
    outputs = logits.sigmoid() if output == "sigmoid" else logits
    count = len(outputs)
    loss = (outputs - batch.targets).square().sum() / (2 * count)
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    hessian = _rows(gradient, flat)
    jacobian = _rows(outputs.flatten(), flat)
    return hessian, jacobian.mT @ jacobian / count


def all_signs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Every choice of signs for the parameters of a network with few of them."""
    parameters = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]
    for signs in itertools.product([-1.0, 1.0], repeat=sum(sizes)):
        parts = torch.tensor(signs, dtype=torch.float64).split(sizes)
        yield {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(parameters.items(), parts, strict=True)
        }


def random_direction(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal numbers relative to the size of each weight."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=source, dtype=p.dtype) * (p.detach().abs() + 0.01)
        for name, p in model.named_parameters()
    }


def flat(direction: dict[str, torch.Tensor]) -> torch.Tensor:
    """A direction as one vector, in the order of the parameters."""
    return torch.cat([part.reshape(-1) for part in direction.values()])


def means(rows: list, quantity: str) -> np.ndarray:
    """The values of one quantity."""
    return np.array([row.value for row in rows if row.quantity == quantity])


def _rows(values: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    rows = [
        torch.autograd.grad(values, leaf, unit, retain_graph=True, is_grads_batched=True)[0]
        for unit in torch.eye(len(values), dtype=torch.float64).split(256)
    ]
    return torch.cat(rows).detach()
