"""Squared norms of whole parameter Jacobians, from few cotangents.

An orthonormal basis of what the linear head lets through (``tasks.head``) gives the norms of every
parameter before the head with R = min(N, d) backward passes. Only the head's own weight and bias
have a part outside; with z = c W phi + ... (c = 1, or the share of one of two heads)

    || d f / d W ||_F^2 = c^2 |s|^2 |phi|^2,        || d f / d b ||^2 = c^2 |s|^2.

Shapes: B images, N outputs, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tasks.head import Head, output_basis
from tasks.layer_graph import LayerGraph
from tasks.parameter_norms import ParameterNorms, parameter_norms

_OUTSIDE = 1e-6  # share of a gradient outside the basis that is rounding; chosen


@dataclass(frozen=True, eq=False)
class JacobianNorms:
    """Squared Frobenius norms of parameter Jacobians, all (L, B) float64 but for the last.

    Attributes:
        weights: || d f / d W_l ||_F^2; NaN for a layer that does not own its weight.
        outputs: || d f / d z_l ||_F^2.
        per_position: sum over positions of || d f / d z_lt ||_F^2 ||p_t||^2; NaN likewise.
        total: (B,), over all parameters.
        num_rows: Cotangents spent.
    """

    weights: torch.Tensor
    outputs: torch.Tensor
    per_position: torch.Tensor
    total: torch.Tensor
    num_rows: int


def jacobian_norms(graph: LayerGraph, head: Head | None, *, at_once: int = 1) -> JacobianNorms:
    """Exact norms, by the basis of the head's outputs where that is smaller than all outputs.

    Args:
        graph: Built with ``parameters=True``.
        head: The network's linear head, if it has one.
        at_once: Cotangents per backward pass. Changes memory and rounding, nothing else.
    """
    basis = output_basis(graph.slope, head)
    if head is not None and len(basis) < graph.slope.shape[1]:
        if _spans_the_others(graph, head, basis):
            return _summed(_completed(graph, head, basis, at_once))
        basis = output_basis(graph.slope, None)
    return _summed(parameter_norms(graph, basis, at_once=at_once))


def rows_at_once(graph: LayerGraph, *, num_bytes: int = 2**28) -> int:
    """Cotangents whose gradients at all layers take about ``num_bytes``."""
    sizes = sum(x.numel() for x in graph.inputs)
    return max(1, num_bytes // max(1, 4 * sizes * graph.logits.element_size()))


def _summed(norms: ParameterNorms) -> JacobianNorms:
    return JacobianNorms(
        weights=norms.weights.sum(0),
        outputs=norms.outputs.sum(0),
        per_position=norms.per_position.sum(0),
        total=norms.total.sum(0),
        num_rows=len(norms.weights),
    )


def _completed(graph: LayerGraph, head: Head, basis: torch.Tensor, at_once: int) -> ParameterNorms:
    """Norms of the basis, with the head's own in closed form (attached to the first cotangent)."""
    norms = parameter_norms(graph, basis, at_once=at_once)
    slopes = graph.slope.square().sum(1)
    passed = (graph.slope * basis[0]).square().sum(1)
    for k, layer in enumerate(graph.layers):
        if layer.name in head.names:
            share = norms.outputs[0, k] / torch.where(passed > 0, passed, 1.0)
            output = share * slopes
            weight = output * graph.inputs[k].double().square().flatten(1).sum(1)
            parts = {
                "weights": weight,
                "biases": output if layer.module.bias is not None else torch.zeros_like(output),
                "outputs": output,
                "per_position": weight,
            }
            for name, value in parts.items():
                column = getattr(norms, name)[:, k]
                column[1:] = 0
                column[0] = value if layer.owns_parameters or name == "outputs" else torch.nan
    return norms


def _spans_the_others(graph: LayerGraph, head: Head, basis: torch.Tensor) -> bool:
    """Whether a cotangent outside the basis reaches nothing but the head's own parameters.

    A bias added behind the head would hear it; then all outputs are needed.
    """
    u = torch.ones_like(graph.slope) + torch.arange(graph.slope.shape[1]).to(graph.slope) % 3
    inside = torch.einsum("rbn,bn->rb", basis, u)
    outside = u - torch.einsum("rbn,rb->bn", basis, inside)
    both = parameter_norms(graph, torch.stack([outside, u]))
    found = [value for name, value in both.others.items()]
    found += [both.weights[:, k] for k, x in enumerate(graph.layers) if x.name not in head.names]
    return all(bool((torch.nan_to_num(f[0]) <= _OUTSIDE**2 * both.total[1]).all()) for f in found)
