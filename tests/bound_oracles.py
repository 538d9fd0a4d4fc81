"""Networks as bounds see them, and the terms of one image by plain autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from jacobian_oracles import path_jacobians
from oracles import columns, make_subject
from torch import nn

from tasks.block import Block
from tasks.bound_forms import Network
from tasks.bounds import Bounds, network_of
from tasks.inequalities import evaluate
from tasks.measurement import Check, Output, Row

Key = tuple[str, str]

FORMS = ("untied", "printed", "direct", "per_position", "gram")
SUMMED = ("untied", "printed")
"""Forms with a sharpness of the network."""

NORMS = 5e-9
"""Upper ends of norms are widened by 1e-9 each; a right side has a few of them."""


def near(value: float) -> object:
    """Equal up to rounding and the ends of norms."""
    return pytest.approx(value, rel=NORMS)


def vectors(*rows: list[float]) -> torch.Tensor:
    """Images of one row of pixels each."""
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 1, 1, -1)


def bound_rows(
    model: nn.Module,
    images: torch.Tensor,
    *,
    output: Output = "identity",
    batch_size: int = 8,
    units: Sequence[range] | None = None,
) -> list[Row]:
    """Rows of the measurement, unit by unit."""
    blocks = units or [range(len(images))]
    served = torch.cat([images, images[:1]])  # the self-test takes two images
    subject = make_subject(model, served, output=output, batch_size=batch_size)
    return [row for unit in blocks for row in Bounds().measure(subject, Block(unit))]


def measured(model: nn.Module, images: torch.Tensor, *, output: Output = "identity") -> Network:
    """Terms of a network on these images."""
    return network_of(columns(bound_rows(model, images, output=output)))


@dataclass(frozen=True)
class Checks:
    """Checks of one network, by equation and form (and layer)."""

    every: list[Check]

    def __call__(self, bound: str, kind: str, layer: str | None = None) -> Check:
        (found,) = (c for c in self.every if (c.bound, c.kind, c.layer) == (bound, kind, layer))
        return found

    @property
    def broken(self) -> list[Check]:
        """Theorems whose conditions are met and that do not hold: there must be none."""
        return [c for c in self.every if c.is_theorem and c.conditions_met and c.holds is not True]


def checks_of(model: nn.Module, images: torch.Tensor, *, output: Output = "identity") -> Checks:
    """All checks of a network on these images."""
    return Checks(evaluate(measured(model, images, output=output)))


def of_kind(network: Network, bound: str, kind: str) -> Check:
    """One check of terms that were made by hand or changed."""
    return Checks(evaluate(network))(bound, kind)


def reference_terms(model: nn.Module, image: torch.Tensor, output: Output) -> dict[Key, float]:
    """Terms of one image, by (quantity, layer): dense Jacobians, positions one after the other."""
    paths = path_jacobians(model, image, output)
    terms: dict[Key, float] = {}
    for name, jacobian in paths.items():
        terms["path_sigma", name] = float(np.linalg.svd(jacobian, compute_uv=False)[0])
        terms["path_frobenius", name] = float(np.linalg.norm(jacobian))
    model = copy.deepcopy(model).double().eval().requires_grad_()
    modules = {n: m for n, m in model.named_modules() if n in paths and n}
    inputs, results = {}, {}

    def remember(name: str):
        def hook(_module: object, args: tuple[torch.Tensor], result: torch.Tensor):
            inputs[name], results[name] = args[0].detach(), result
            return result.clone()

        return hook

    for name, module in modules.items():
        module.register_forward_hook(remember(name))
    logits = model(image[None].double().clone())[0]
    f = torch.sigmoid(logits) if output == "sigmoid" else logits
    parameters = dict(model.named_parameters())
    jacobians = [
        torch.autograd.grad(
            y, [*parameters.values(), *results.values()], retain_graph=True,
            allow_unused=True, materialize_grads=True,
        )
        for y in f
    ]  # fmt: skip
    stacked = [torch.stack(rows) for rows in zip(*jacobians, strict=True)]
    of_parameters = dict(zip(parameters, stacked[: len(parameters)], strict=True))
    of_outputs = dict(zip(results, stacked[len(parameters) :], strict=True))
    terms["weight_gradient", ""] = sum(_square(j) for j in of_parameters.values())
    for name, module in modules.items():
        x, g = inputs[name], of_outputs[name]
        terms["input_norm", name] = float(x.norm())
        terms["weight_gradient", name] = _square(of_parameters[f"{name}.weight"])
        terms["output_gradient", name] = _square(g)
        pairs = list(positions(module, x[0], g[:, 0]))
        terms["position_gradient", name] = sum(_square(g_t) * _square(p) for p, g_t, _ in pairs)
        terms["least_position", name] = min(float(p.norm()) for p, _, _ in pairs)
        grams = []
        for group in range(getattr(module, "groups", 1)):
            stack = torch.stack([p.flatten() for p, _, owner in pairs if owner == group])
            least = np.linalg.eigvalsh((stack @ stack.T).numpy())[0]
            grams.append(least if stack.shape[0] <= stack.shape[1] else 0.0)
        terms["least_gram", name] = float(min(grams))
    first = next(iter(modules))
    x, weight = image.double().flatten(), parameters[f"{first}.weight"].detach()
    terms["input_invariant", ""] = float(((paths[""] * x.numpy()) ** 2).sum())
    terms["first_adaptive", ""] = _square(of_parameters[f"{first}.weight"] * weight)
    groups = getattr(modules[first], "groups", 1)
    kernels = weight.reshape(groups, -1, weight[0].numel())
    terms["first_adaptive_untied", ""] = sum(
        _square(kernels[owner] * g_t[:, :, None] * p.flatten())
        for p, g_t, owner in positions(modules[first], inputs[first][0], of_outputs[first][:, 0])
    )
    terms["first_terms", ""] = float(_most_terms(modules[first], inputs[first]))
    return terms


def positions(module: nn.Module, x: torch.Tensor, g: torch.Tensor):
    """Input p_t, output gradient (N, h) and group of every position of one image."""
    if isinstance(module, nn.Linear):
        tokens = x.reshape(-1, x.shape[-1])
        gradients = g.reshape(len(g), -1, g.shape[-1])
        yield from ((p, gradients[:, t], 0) for t, p in enumerate(tokens))
        return
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    (ph, pw), (sh, sw), (dh, dw) = module.padding, module.stride, module.dilation
    (kh, kw), groups = module.kernel_size, module.groups
    padded = x.new_zeros(len(x), x.shape[1] + 2 * ph, x.shape[2] + 2 * pw)
    padded[:, ph : ph + x.shape[1], pw : pw + x.shape[2]] = x
    for group in range(groups):
        of_input = padded.chunk(groups)[group]
        of_output = g.chunk(groups, 1)[group]
        for i in range(g.shape[2]):
            for j in range(g.shape[3]):
                rows = slice(i * sh, i * sh + dh * (kh - 1) + 1, dh)
                along = slice(j * sw, j * sw + dw * (kw - 1) + 1, dw)
                yield of_input[:, rows, along], of_output[:, :, i, j], group


def _most_terms(module: nn.Module, x: torch.Tensor) -> int:
    """Outputs that depend on one input scalar, at most: counted in the dense operator."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.fill_(1.0)  # type: ignore[operator, union-attr]
    dense = torch.autograd.functional.jacobian(module, x)
    return int((dense.reshape(-1, x.numel()) != 0).sum(0).max())


def _square(t: torch.Tensor) -> float:
    return float(t.detach().square().sum())
