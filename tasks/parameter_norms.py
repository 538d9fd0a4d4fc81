"""Squared norms of the gradients of every parameter, image by image, without a loop over images.

For cotangents u of the outputs f and image i, ||d (u . f(x_i)) / d theta||^2 from one backward pass
for all images. A layer's weight gradient is sum_t g_t p_t^T: either it is formed, or its norm is
taken from the two Gram matrices of positions, sum_ts <g_t, g_s> <p_t, p_s> (the "ghost norm" of
arXiv 2009.03106), whichever is cheaper. Parameters that no layer owns (normalisation, tokens,
tables) have one copy per image and plain gradients.

``check_coverage`` compares with autograd, parameter by parameter, before any number is reported.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from tasks.finite import require_finite
from tasks.jacobian import forward
from tasks.layer_graph import LayerGraph, layer_graph
from tasks.layers import Layer
from tasks.measurement import MeasurementError, Subject
from tasks.positions import input_positions, output_positions
from tasks.random import generator
from tasks.replaced import replaced

# In no-grad forwards of one image: a backward pass to all layers and parameters (ViT-S, CPU).
NORMS_COST = 1.4

# Forming the gradient costs T d h, Gram matrices T^2 (d + h) in float64: they must save at least
# half.
_GRAM_ADVANTAGE = 2
_LIMITS = {torch.float32: 1e-3, torch.float64: 1e-9}  # coverage check, relative; chosen


@dataclass(frozen=True, eq=False)
class ParameterNorms:
    """Squared gradient norms of R cotangents, all float64.

    Attributes:
        weights: (R, L, B), of each layer's weight; NaN for a layer that does not own its weight.
        biases: (R, L, B), of each layer's bias, 0 where it has none, NaN likewise.
        outputs: (R, L, B), ||g||^2 summed over a layer's outputs.
        per_position: (R, L, B), sum over positions of ||g_t||^2 ||p_t||^2; NaN likewise.
        others: By parameter name, (R, B).
    """

    weights: torch.Tensor
    biases: torch.Tensor
    outputs: torch.Tensor
    per_position: torch.Tensor
    others: dict[str, torch.Tensor]

    @property
    def total(self) -> torch.Tensor:
        """(R, B), over all parameters."""
        owned = torch.nan_to_num(self.weights + self.biases).sum(1)
        return owned + sum(self.others.values())


def parameter_norms(
    graph: LayerGraph, cotangents: torch.Tensor, *, at_once: int = 1
) -> ParameterNorms:
    """Squared norms of every parameter's gradient for each cotangent and image.

    Args:
        graph: Built with ``parameters=True``.
        cotangents: (R, B, N), of the outputs f.
        at_once: Cotangents per backward pass. Changes memory and rounding, nothing else.

    Returns:
        The norms. Summed over an orthonormal basis of the outputs they are those of the whole
        Jacobian; their mean over random u with E u u^T = 1 is the same in expectation.
    """
    every = range(len(graph.layers))
    positions = [
        input_positions(layer, x) if layer.owns_parameters else None
        for layer, x in zip(graph.layers, graph.inputs, strict=True)
    ]
    squares: list[torch.Tensor] = []
    others: list[dict[str, torch.Tensor]] = []
    for some in cotangents.split(at_once):
        found = graph.pull(some, outputs=every, others=True)
        square = found.scale**2
        blank = square.new_zeros(4, len(some), 0, len(graph.logits))
        of_layers = [
            _layer_norms(layer, positions[k], found.outputs[k])[:, :, None]
            for k, layer in enumerate(graph.layers)
        ]
        squares.append(torch.cat([blank, *of_layers], 2) * square[:, None])
        others.append({n: _squares(g, 2) * square for n, g in found.others.items()})
    weights, biases, sums, per_position = torch.cat(squares, 1)
    of_others = {name: torch.cat([part[name] for part in others]) for name in others[0]}
    return ParameterNorms(weights, biases, sums, per_position, of_others)


def check_coverage(subject: Subject) -> None:
    """Compare with autograd on the first image: every trainable parameter, once per checkpoint.

    Raises:
        MeasurementError: If the squared norm of a parameter's gradient differs, or the image or its
            logits are not finite.
    """
    if "parameter_coverage" in subject.cache:
        return
    model, images = subject.model, subject.batch([0]).inputs
    graph = layer_graph(model, images, subject.output, parameters=True)
    require_finite(model, images, graph.logits, (0,))
    normals = torch.randn(
        graph.logits.shape, generator=generator(subject.seed, "coverage"), dtype=torch.float64
    )
    # Of the logits, so that saturated outputs leave something to compare.
    normals = normals.to(images.device)
    graph = dataclasses.replace(graph, slope=torch.ones_like(graph.slope))
    norms = parameter_norms(graph, normals[None])
    found = {name: float(n) for name, n in norms.others.items()}
    for k, layer in enumerate(graph.layers):
        if layer.owns_parameters:
            prefix = layer.name + "."
            found[prefix + "weight"] = float(norms.weights[0, k, 0])
            if layer.module.bias is not None:
                found[prefix + "bias"] = float(norms.biases[0, k, 0])
    expected = _by_autograd(model, images, normals)
    if missing := sorted(expected.keys() - found.keys()):
        raise MeasurementError(f"coverage: no gradient norm for the parameters {missing[:3]}")
    limit = _LIMITS[images.dtype]
    # Where positions cancel in a whole gradient, rounding has their size and not the gradient's.
    total = sum(expected.values()) + float(torch.nan_to_num(norms.per_position).sum())
    for name, norm in expected.items():
        if not abs(found[name] - norm) <= limit * (norm + limit * total):
            raise MeasurementError(
                f"coverage: the squared gradient norm of parameter {name!r} is {norm:.6g} by "
                f"autograd and {found[name]:.6g} image by image. The module applies it in another "
                "way than torch's own; report the architecture."
            )
    subject.cache["parameter_coverage"] = True


def _by_autograd(
    model: torch.nn.Module, images: torch.Tensor, weights: torch.Tensor
) -> dict[str, float]:
    """Squared gradient norms of weights . logits for one image, by one plain backward pass."""
    values = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    with torch.enable_grad():
        logits = forward(replaced(model, values), images.clone())
        gradients = torch.autograd.grad(
            (logits.double() * weights).sum(),
            list(values.values()),
            allow_unused=True,
            materialize_grads=True,
        )
    return {
        name: float(g.double().square().sum()) for name, g in zip(values, gradients, strict=True)
    }


def _layer_norms(
    layer: Layer, positions: torch.Tensor | None, gradients: torch.Tensor
) -> torch.Tensor:
    """Squares for weight, bias, outputs and single positions of one layer, (4, R, B)."""
    sums = _squares(gradients, 2)
    if positions is None:
        unknown = torch.full_like(sums, torch.nan)
        return torch.stack([unknown, unknown, sums, unknown])
    g = output_positions(layer, gradients)  # (R, B, G, T, h)
    each = (_squares(g, 4) * _squares(positions, 3)).flatten(2).sum(2)
    (num_positions, inputs), outputs = positions.shape[-2:], g.shape[-1]
    if num_positions == 1:
        weight = each
    elif _GRAM_ADVANTAGE * num_positions * (inputs + outputs) <= inputs * outputs:
        # Float32 products would leave an error of 1e-7 of what positions have before they cancel,
        # more than the whole norm where they do, and of either sign.
        g, positions = g.double(), positions.double()
        grams = (g @ g.mT) * (positions @ positions.mT)
        weight = grams.flatten(2).sum(2).clamp(min=0)
    else:
        weight = _squares(g.mT @ positions, 2)
    bias = torch.zeros_like(weight) if layer.module.bias is None else _squares(g.sum(-2), 2)
    return torch.stack([weight, bias, sums, each])


def _squares(t: torch.Tensor, lead: int) -> torch.Tensor:
    """Sum of squares over all but the first ``lead`` dimensions, float64."""
    return t.double().square().reshape(*t.shape[:lead], -1).sum(-1)
