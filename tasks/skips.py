"""Layers whose input also feeds a skip connection: the terms of Eq. 16 and 17.

For a residual branch x + h(W x), the derivative of f with respect to x is K = J + A, J through the
skip connection and A = J_l W_l through the layer. |‖K‖_2 - ‖J‖_2| <= ‖A‖_2 (Eq. 17). The gradient
at the activation itself, which layers and skips share, needs a forward without the zeros that tell
layers apart; it is taken where one backward pass shows that it differs from the layer's own.

Shapes: B images, N outputs, R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tasks.head import Head, output_basis
from tasks.jacobian import forward, unit_scale
from tasks.layer_graph import LayerGraph, layer_graph
from tasks.measurement import Batch, Subject
from tasks.random import generator, normal_vectors

_NORM_ROUNDING = 32 * torch.finfo(torch.float64).eps  # of ‖K‖_2 and ‖J‖_2, relative; chosen
_ROUNDING = 1e-4  # relative difference of gradients or activations that is rounding; chosen


def skip_sigmas(
    subject: Subject,
    batch: Batch,
    graph: LayerGraph,
    head: Head | None,
    *,
    memory_gib: float,
    among: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """|‖K‖_2 - ‖J‖_2| of every layer whose input also goes elsewhere.

    Args:
        subject: The network.
        batch: Images.
        graph: Of the same images.
        head: The network's linear head, if it has one.
        memory_gib: Rows held at once, in GiB; more images and layers take more passes. Those of one
            layer and image are held in any case.
        among: Indices of the layers to take; None looks for them.

    Returns:
        By layer name, (B,) float64, less what rounding of both norms may add: a branch that starts
        at zero has a difference of nothing but that. Empty for networks without such layers, as
        pre-norm transformers, whose branches read a normalised copy.
    """
    num_bytes = int(memory_gib * 2**30)
    with torch.enable_grad():
        logits, activations = _activations(subject.model, batch.inputs, graph)
    basis = output_basis(graph.slope, head)
    if among is None:
        among = []
        probe = _random_cotangent(subject, batch, graph)
        for group in _groups(list(activations), activations, 1, num_bytes):
            both = _both(graph, logits, {k: activations[k] for k in group}, probe)
            among += [k for k, (total, path) in both.items() if _differ(total, path)]
    shared = [k for k in among if k in activations]
    count = len(batch.samples)
    if count > 1 and any(_row_bytes(activations[k], len(basis)) > num_bytes for k in shared):
        del logits, activations  # their graph, before the next ones are built
        halves = [
            skip_sigmas(
                subject,
                half,
                layer_graph(subject.model, half.inputs, subject.output),
                head,
                memory_gib=memory_gib,
                among=shared,
            )
            for half in (batch.part(slice(count // 2)), batch.part(slice(count // 2, count)))
        ]
        return {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
    found: dict[str, np.ndarray] = {}
    for group in _groups(shared, activations, len(basis), num_bytes):
        chosen = {k: activations[k] for k in group}
        rows = [_both(graph, logits, chosen, cotangent) for cotangent in basis]
        for k in group:
            totals = torch.stack([row[k][0] for row in rows], 1)
            skips = totals - torch.stack([row[k][1] for row in rows], 1)
            both = torch.stack([torch.linalg.matrix_norm(m, 2) for m in (totals, skips)])
            # J = K - A in float64, so rounding of float32 products leaves Eq. 17 alone.
            lower = ((both[0] - both[1]).abs() - _NORM_ROUNDING * both.amax(0)).clamp(min=0)
            found[graph.layers[k].name] = lower.cpu().numpy()
    return found


def _both(
    graph: LayerGraph, logits: torch.Tensor, activations: dict[int, torch.Tensor], u: torch.Tensor
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Gradient at each activation, and its part through the layer: (B, D) float64 each."""
    if not activations:
        return {}
    weighted = graph.slope * u
    scale = unit_scale(weighted)[:, None]
    totals = torch.autograd.grad(
        logits,
        list(activations.values()),
        (weighted / scale).to(logits.dtype),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    pulled = graph.pull(u[None], inputs=list(activations))
    return {
        k: (
            total.reshape(len(u), -1).double() * scale,
            pulled.inputs[k][0].flatten(1).double() * pulled.scale[0, :, None],
        )
        for k, total in zip(activations, totals, strict=True)
    }


def _random_cotangent(subject: Subject, batch: Batch, graph: LayerGraph) -> torch.Tensor:
    """One normal cotangent per image, (B, N) float64: nothing a network computes is orthogonal."""
    generators = [generator(subject.seed, "skips", i) for i in batch.samples]
    return normal_vectors(generators, graph.slope.shape[1]).to(graph.slope.device)


def _differ(total: torch.Tensor, path: torch.Tensor) -> bool:
    return bool((total - path).norm() > _ROUNDING * (total.norm() + path.norm()))


def _row_bytes(activation: torch.Tensor, num_rows: int) -> int:
    """Rows of a layer, both kinds in float64."""
    return 2 * 8 * num_rows * activation.numel()


def _groups(
    layers: list[int], activations: dict[int, torch.Tensor], num_rows: int, num_bytes: int
) -> list[list[int]]:
    """Layers whose rows are held together; at least one."""
    groups: list[list[int]] = []
    free = 0
    for k in layers:
        needed = _row_bytes(activations[k], num_rows)
        if not groups or needed > free:
            groups.append([])
            free = num_bytes
        groups[-1].append(k)
        free -= needed
    return groups


def _activations(
    model: nn.Module, images: torch.Tensor, graph: LayerGraph
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits and the layers' inputs as the network made them, where images lead their batch."""
    index: dict[tuple[nn.Module, int], int] = {
        (layer.module, layer.call): k for k, layer in enumerate(graph.layers)
    }
    calls: Counter[nn.Module] = Counter()
    found: dict[int, torch.Tensor] = {}
    versions: dict[int, int] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        k = index.get((module, calls[module]))
        # Windows that a network keeps in another order than image by image are left out.
        if k is not None and args[0].requires_grad and _equal(args[0], graph.inputs[k]):
            found[k], versions[k] = args[0], args[0]._version

    # Once a module, however often the network calls it.
    modules = {layer.module for layer in graph.layers}
    handles = [module.register_forward_pre_hook(before) for module in modules]
    try:
        logits = forward(model, images.detach().clone().requires_grad_().clone())
    finally:
        for handle in handles:
            handle.remove()
    # Overwritten in place since, an activation stands for what came after.
    return logits, {k: a for k, a in found.items() if a._version == versions[k]}


def _equal(activation: torch.Tensor, expected: torch.Tensor) -> bool:
    if activation.numel() != expected.numel():
        return False
    difference = activation.detach().reshape(expected.shape) - expected
    return bool(difference.norm() <= _ROUNDING * expected.norm())
