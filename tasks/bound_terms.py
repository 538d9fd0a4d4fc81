"""What the inequalities between flatness and compression are made of, per image and layer.

For image i and layer l, with the path Jacobian A = J_l W_l (f through layer l alone), the layer's
input x, its positions p_t and the gradients g_t at its outputs (``tasks.positions``):

    path_sigma, path_frobenius    ||A||_2, ||A||_F; of the image's Jacobian with no layer
    path_log_volume, path_rank    log of the product of the singular values above rounding; how many
    input_norm                    ||x||; of the image with no layer
    weight_gradient               || d f / d W_l ||_F^2; of all parameters with no layer
    output_gradient               || d f / d z_l ||_F^2 = sum_t ||g_t||^2
    position_gradient             sum_t ||g_t||^2 ||p_t||^2
    least_position, least_gram    min_t ||p_t||; smallest eigenvalue of (<p_t, p_s>)_ts, 0 if T > d
                                  or if it is rounding
    skip_sigma                    what the skip connection around the layer carries, see
                                  ``tasks.skips``

and of the layer that reads the image, Eq. 43 and 44:

    input_invariant               || A diag(x) ||_F^2 of the image
    first_adaptive                sum_jp || d f / d W_jp ||^2 W_jp^2
    first_adaptive_untied         the same with a weight of its own at every position
    first_terms                   products g_tj W_jp in one d f / d x_p, at most: d of Eq. 44

Everything is exact: R = min(N, features of the head) backward passes for each of three sets.

Shapes: B images, L layers, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tasks.convolution import convolution
from tasks.exact_norms import JacobianNorms, jacobian_norms, rows_at_once
from tasks.head import Head, output_basis, subject_head
from tasks.layer_graph import LayerGraph
from tasks.layer_rows import IMAGE, checked_graph
from tasks.layers import Layer
from tasks.measurement import Batch, Subject
from tasks.parameter_norms import NORMS_COST
from tasks.plain_layers import is_plain
from tasks.positions import input_positions, output_positions
from tasks.skips import skip_sigmas
from tasks.spectra import Spectra, numerical_rank, spectra

_GRADIENT_NUMBERS = 2**24  # of the first layer's weight, held at once; chosen

# Share of the largest eigenvalue of a Gram matrix below which one is rounding: of the positions
# (1e-6 of a singular value in float32, as for ranks) or of the eigenvalues themselves; chosen.
_DEPENDENT = 1e-12

WHOLE = ""
"""Key of the terms of the whole network among those of layers."""


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms of a batch.

    Attributes:
        values: Quantity -> layer name or ``WHOLE`` -> (B,) float64.
        forward_equivalents: Work per image in no-grad forwards.
    """

    values: dict[str, dict[str, np.ndarray]]
    forward_equivalents: float


def bound_terms(subject: Subject, batch: Batch, *, memory_gib: float) -> Terms:
    """Measure the terms of a batch.

    Args:
        subject: The network; its parameter gradients must be covered
            (``tasks.parameter_norms.check_coverage``).
        batch: Images.
        memory_gib: Rows of Jacobians held at once, in GiB.

    Raises:
        MeasurementError: If the network gives NaN logits, fails the self-test, has no layer, or the
            rows of one layer and image take more than ``memory_gib``.
    """
    found = spectra(subject, batch, layers=True, memory_gib=memory_gib)
    graph = checked_graph(subject, batch, parameters=True)
    head = subject_head(subject, batch.inputs)
    norms = jacobian_norms(graph, head, at_once=rows_at_once(graph))
    values = _spectral(found) | _lengths(graph, batch) | _gradients(graph, norms)
    first = first_layer(graph, batch.inputs)
    if first is not None:
        values |= _input_invariant(graph, head, first)
    values["skip_sigma"] = skip_sigmas(subject, batch, graph, head, memory_gib=memory_gib)
    work = found.forward_equivalents + NORMS_COST * (norms.num_rows + found.num_rows)
    return Terms(values, work)


def first_layer(graph: LayerGraph, images: torch.Tensor) -> int | None:
    """The layer that reads the images as they are, if it owns its weight; else None.

    Whether nothing else reads them is told by the norms of the two Jacobians.
    """
    if not graph.layers or not graph.layers[0].owns_parameters:
        return None
    x = graph.inputs[0].flatten(1)
    same = x.shape == images.flatten(1).shape and bool((x == images.flatten(1)).all())
    return 0 if same else None


def num_terms(layer: Layer) -> int:
    """Products g_tj W_jp in the derivative with respect to one input scalar, at most.

    The outputs of a linear layer; for a convolution, its outputs per group times the patches that
    an input position is in.
    """
    module = layer.module
    if isinstance(module, nn.Linear):
        return module.out_features
    size = layer.input_shape[-2], layer.input_shape[-1]
    conv = convolution(module, module.weight.detach().double(), size, name=layer.name)
    return module.out_channels // module.groups * conv.rows.overlap * conv.columns.overlap


def _spectral(found: Spectra) -> dict[str, dict[str, np.ndarray]]:
    values: dict[str, dict[str, np.ndarray]] = {}
    for name, s in found.singular_values.items():
        key = WHOLE if name == IMAGE else name
        rank, clear = numerical_rank(s, found.noise[name])
        kept = np.arange(s.shape[1]) < rank[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(kept, np.log(np.where(kept, s, 1.0)), 0.0).sum(1)
        terms = {
            "path_sigma": s[:, 0],
            "path_frobenius": found.frobenius(name),
            "path_log_volume": np.where(rank > 0, logs, -np.inf),
            "path_rank": rank.astype(np.float64),
            "path_rank_is_clear": clear.astype(np.float64),
        }
        for quantity, value in terms.items():
            values.setdefault(quantity, {})[key] = value
    return values


def _lengths(graph: LayerGraph, batch: Batch) -> dict[str, dict[str, np.ndarray]]:
    lengths = {WHOLE: _norm(batch.inputs)}
    least_position, least_gram = {}, {}
    for layer, x in zip(graph.layers, graph.inputs, strict=True):
        lengths[layer.name] = _norm(x)
        if not layer.owns_parameters:
            continue
        p = input_positions(layer, x).double()
        least_position[layer.name] = p.norm(dim=-1).flatten(1).amin(1).cpu().numpy()
        count, size = p.shape[-2:]
        least_gram[layer.name] = (
            _least_eigenvalues(p @ p.mT).amin(1).cpu().numpy()
            if count <= size
            else np.zeros(len(p))
        )
    return {
        "input_norm": lengths, "least_position": least_position, "least_gram": least_gram,
    }  # fmt: skip


def _least_eigenvalues(gram: torch.Tensor) -> torch.Tensor:
    """Smallest eigenvalues of (..., T, T), 0 where they cannot be told from 0."""
    values = torch.linalg.eigvalsh(gram)
    least = values[..., 0]
    return torch.where(least > _DEPENDENT * values[..., -1], least, 0.0)


def _gradients(graph: LayerGraph, norms: JacobianNorms) -> dict[str, dict[str, np.ndarray]]:
    weight = {WHOLE: norms.total.cpu().numpy()}
    output, position = {}, {}
    for k, layer in enumerate(graph.layers):
        output[layer.name] = norms.outputs[k].cpu().numpy()
        if layer.owns_parameters:
            weight[layer.name] = norms.weights[k].cpu().numpy()
            position[layer.name] = norms.per_position[k].cpu().numpy()
    return {
        "weight_gradient": weight, "output_gradient": output, "position_gradient": position,
    }  # fmt: skip


def _input_invariant(
    graph: LayerGraph, head: Head | None, first: int
) -> dict[str, dict[str, np.ndarray]]:
    """Both sides of Eq. 44, row by row of the output basis."""
    layer, x = graph.layers[first], graph.inputs[first]
    assert is_plain(layer.module)
    p = input_positions(layer, x).double()
    weight = layer.module.weight.detach().double()
    squares = weight.square().reshape(p.shape[1], -1, p.shape[-1])
    if head is not None and layer.name in head.names:
        head = None  # its own weight hears all outputs, not only those of the head's basis
    invariant = x.new_zeros(len(x), dtype=torch.float64)
    adaptive, outputs = torch.zeros_like(invariant), None
    # The weight's gradients are formed: as many numbers per row and image as the weight has.
    fitting = max(1, _GRADIENT_NUMBERS // (len(x) * weight.numel()))
    for chunk in output_basis(graph.slope, head).split(min(rows_at_once(graph), fitting)):
        found = graph.pull(chunk, inputs=[first], outputs=[first])
        scale = found.scale[..., None]
        rows = (found.inputs[first].double() * x.double()).flatten(2) * scale
        invariant += rows.square().sum((0, 2))
        g = output_positions(layer, found.outputs[first]).double() * scale[..., None, None]
        adaptive += ((g.mT @ p).square() * squares).sum((0, 2, 3, 4))
        squared = g.square().sum(0)
        outputs = squared if outputs is None else outputs + squared
    assert outputs is not None
    untied = ((outputs.mT @ p.square()) * squares).sum((1, 2, 3))
    terms = {
        "input_invariant": invariant,
        "first_adaptive": adaptive,
        "first_adaptive_untied": untied,
        "first_terms": torch.full_like(invariant, num_terms(layer)),
    }
    return {quantity: {WHOLE: value.cpu().numpy()} for quantity, value in terms.items()}


def _norm(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().flatten(1).norm(dim=1).cpu().numpy()
