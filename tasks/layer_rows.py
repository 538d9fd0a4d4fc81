"""Rows of the Jacobians of the outputs with respect to the images and every layer's input.

For every image, J = d f / d x, and for every layer l the J_l W_l = d f / d x_l through layer l
alone (Eq. 4). One set of transposed products gives the rows of all of them at once. Where the
network ends in a linear head, cotangents are an orthonormal basis of what the head lets through
(``tasks.head``), so that a network of 1000 outputs and 192 features needs 192 rows; they have the
singular values and norms of all rows.

Memory: the rows of one image and layer of D inputs are R D numbers in the network's dtype. Images
are split first, down to single ones, because that costs nothing; then layers are taken in groups,
each with passes of its own. Neither changes a number beyond rounding.

Shapes: B images, N outputs, R = min(N, features of the head) rows, D inputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from tasks.finite import require_logits
from tasks.head import output_basis, subject_head
from tasks.layer_graph import LayerGraph, layer_graph
from tasks.layers import Layer, find_layers
from tasks.measurement import Batch, MeasurementError, Subject

IMAGE = ""
"""Name of the images' own Jacobian beside those of the layers."""

# Costs in no-grad forwards of one image: the graph of all layers, and a row (ViT-Ti, CPU).
GRAPH_COST = 3.0
ROW_COST = 1.25

_CHUNK_BYTES = 2**27  # gradients of one backward pass, beside the rows that are kept; chosen
_MAX_CHUNK = 32  # cotangents of one backward pass; chosen

Reduce = Callable[[str, tuple[int, ...], torch.Tensor, torch.Tensor], np.ndarray]
"""Map, samples (B), rows (B, R, D) that may be overwritten, their scales (B, R) float64 -> (B, ...)
"""


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Which rows are wanted, and what to compute at once.

    Attributes:
        sizes: D by map, in order.
        indices: Layer index by map; -1 for the images.
        groups: Maps whose rows are held together.
        images_at_once: How many images.
        num_rows: R.
        constant: Linear and convolutional modules whose input does not depend on the image: they
            are no layers and have no Jacobian.
    """

    sizes: dict[str, int]
    indices: dict[str, int]
    groups: list[list[str]]
    images_at_once: int
    num_rows: int
    constant: tuple[str, ...]

    @property
    def forward_equivalents(self) -> float:
        """Work per image in no-grad forwards."""
        return GRAPH_COST + ROW_COST * self.num_rows * len(self.groups)


def plan_rows(
    subject: Subject, batch: Batch, *, image: bool, layers: bool, memory_gib: float
) -> RowPlan:
    """Plan the rows of a batch.

    Args:
        subject: The network.
        batch: Images.
        image: Whether to take the Jacobian with respect to the images.
        layers: Whether to take those with respect to every layer's input.
        memory_gib: Rows held at once, in GiB. Each backward pass and the graph come on top.

    Raises:
        MeasurementError: If the rows of one image and layer take more, or the network has no layer.
    """
    count = num_rows(subject, batch)
    found, constant = network_layers(subject) if layers else ((), ())
    sizes = {IMAGE: batch.inputs[0].numel()} if image else {}
    indices = {IMAGE: -1} if image else {}
    for k, layer in enumerate(found):
        sizes[layer.name], indices[layer.name] = prod(layer.input_shape), k
    row = count * batch.inputs.element_size()
    budget = int(memory_gib * 2**30)
    for name, size in sizes.items():
        if row * size > budget:
            what = f"layer {name}" if name else "images"
            raise MeasurementError(
                f"{what}: the {count} rows of one image's Jacobian, {size} inputs, take "
                f"{row * size / 2**30:.3g} GiB, more than memory_gib = {memory_gib:g}. Raise "
                "memory_gib, or take a method without rows: nmls has lanczos, "
                "local_dimensionality probes, input_invariant_mls hutchinson."
            )
    names = list(sizes)
    groups = [[names[i] for i in group] for group in _groups(list(sizes.values()), budget // row)]
    at_once = max(1, min(len(batch.samples), budget // (row * sum(sizes.values()))))
    return RowPlan(sizes, indices, groups, at_once, count, constant)


def num_passes(sizes: Sequence[int], num_rows: int, memory_gib: float) -> int:
    """How often all float32 rows are computed, for maps of these sizes; a prediction."""
    return max(1, len(_groups(sizes, int(memory_gib * 2**30) // (4 * num_rows))))


def _groups(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Maps in order, as many together as the budget of numbers per row allows, at least one."""
    groups: list[list[int]] = []
    held = 0
    for number, size in enumerate(sizes):
        if groups and held + size <= budget:
            groups[-1].append(number)
            held += size
        else:
            groups.append([number])
            held = size
    return groups


def reduce_rows(
    subject: Subject, batch: Batch, plan: RowPlan, reduce: Reduce
) -> dict[str, np.ndarray]:
    """What ``reduce`` makes of every map's rows, concatenated over images.

    Raises:
        MeasurementError: If the network gives NaN logits, or not one per class.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in plan.sizes}
    for start in range(0, len(batch.samples), plan.images_at_once):
        chosen = batch.part(slice(start, start + plan.images_at_once))
        graph = checked_graph(subject, chosen)
        cotangents = output_basis(graph.slope, subject_head(subject, batch.inputs))
        for group in plan.groups:
            for name, rows, scale in _rows(graph, cotangents, plan, group):
                found[name].append(reduce(name, chosen.samples, rows, scale))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def checked_graph(subject: Subject, batch: Batch, *, parameters: bool = False) -> LayerGraph:
    """The graph of a batch's layers.

    Raises:
        MeasurementError: If the network gives NaN logits, or not one per class.
    """
    graph = layer_graph(subject.model, batch.inputs, subject.output, parameters=parameters)
    require_logits(subject.model, batch, graph.logits)
    return graph


def memory_text(num_rows: int, size: int, memory_gib: float = math.inf) -> str:
    """What ``num_rows`` float32 rows of ``size`` numbers take, and whether that is too much."""
    mib = 4 * num_rows * size / 2**20
    text = f"{mib:.0f} MiB" if mib < 1000 else f"{mib / 2**10:.1f} GiB"
    text = "less than 1 MiB" if mib < 1 else text
    over = f", more than memory_gib = {memory_gib:g}: raise it" if mib > memory_gib * 2**10 else ""
    return f"{text} (float32){over}"


def num_rows(subject: Subject, batch: Batch) -> int:
    """R: the outputs, or the features of a linear head if fewer."""
    head, num_outputs = subject_head(subject, batch.inputs), batch.targets.shape[1]
    return num_outputs if head is None else min(num_outputs, head.weight.shape[1])


def network_layers(subject: Subject) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Layers and modules on constant inputs (``find_layers``), looked for once per subject.

    Raises:
        MeasurementError: If there is no layer.
    """
    if "layers" not in subject.cache:
        subject.cache["layers"] = find_layers(subject.model, subject.batch((0,)).inputs)
    if not subject.cache["layers"][0]:
        raise MeasurementError(
            "expected linear or convolutional modules (nn.Linear, nn.Conv2d) whose input depends "
            "on the image, found none. Layer-wise quantities of this network are not defined."
        )
    return subject.cache["layers"]


def _rows(
    graph: LayerGraph, cotangents: torch.Tensor, plan: RowPlan, group: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Rows (B, R, D) of a group's maps and their scales (B, R)."""
    height, count, _ = cotangents.shape
    dtype = graph.logits.dtype
    kept = {
        name: torch.empty((count, height, plan.sizes[name]), dtype=dtype, device=cotangents.device)
        for name in group
    }
    scale = cotangents.new_empty((count, height))
    wanted = [plan.indices[name] for name in group if name != IMAGE]
    one = count * dtype.itemsize * sum(plan.sizes[name] for name in group)
    step = max(1, min(_MAX_CHUNK, _CHUNK_BYTES // one))
    for start in range(0, height, step):
        chunk = slice(start, start + step)
        pulled = graph.pull(cotangents[chunk], images=IMAGE in group, inputs=wanted)
        scale[:, chunk] = pulled.scale.mT
        for name in group:
            rows = pulled.images if name == IMAGE else pulled.inputs[plan.indices[name]]
            assert rows is not None
            kept[name][:, chunk] = rows.flatten(2).transpose(0, 1)
    for name in group:
        yield name, kept.pop(name), scale
