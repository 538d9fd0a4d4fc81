"""Norms of linear and convolutional layers as linear operators on the input of one image.

The norm ||T||_2 of nn.Linear is that of its matrix, whatever number of tokens it is applied to.
That of nn.Conv2d depends on the image size, stride, padding, dilation and groups; T is never formed
unless it is small. Every answer is an enclosure:

    lower    a Ritz value of T^T T, or the kernel as a matrix K (C_out x C_in h w), of which T
             contains a copy wherever a patch meets no padding
    upper    the smaller of two certificates, or the exact value of the dense operator

**Overlap.** ||T x||^2 = sum_i ||K p_i||^2 <= ||K||_2^2 sum_i ||p_i||^2 <= c ||K||_2^2 ||x||^2 if
no input position is in more than c of the patches p_i. With c = 1 (patch embeddings, 1 x 1
kernels) both ends are ||K||_2. The authors' constant ||K||_F (H_out W_out)^(1/2) is never smaller.

**Symbol.** T is, up to a permutation of its input, a submatrix of the convolution on a circle of
n positions (``Axis.circle``) with the phase kernel K_q, whose norm is the largest ||S(w)||_2,
S(w) = sum_q K_q exp(-i w q), over the n frequencies. A long axis takes G < n frequencies instead.
With Q = 2 r + 1 taps (r a multiple of 1/2), p(w) = Re exp(i r w + i c) u^* S(w) v is a
trigonometric polynomial of degree r (in w / 2 of degree 2 r), so p'^2 + r^2 p^2 <= r^2 max p^2
(Bernstein and Szegő) and p >= cos(pi r / G) max p at the grid point next to its maximum. With u, v
and c those of the maximum of ||S||_2, the largest norm on the grid divided by that cosine, once per
axis, is an upper bound. A stride becomes channels of the phase kernel, a dilation zero taps;
kernels need not be odd or square.

Intervals are widened by a relative 1e-9 for rounding, which is not part of the proofs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from tasks.convolution import Axis, Convolution, convolution
from tasks.lanczos import Apply, lanczos
from tasks.plain_layers import applied_weight
from tasks.random import generator

_ROUNDING = 1e-9  # far above what is seen (1e-14): size times eps times stable rank, roughly
_WORK = 7e9  # multiplications for the symbol or dense operators of a layer: seconds; chosen
_DENSE_ENTRIES = 2**23  # chosen
_RITZ_TOLERANCE = 0.01  # the symbol's certificate is about that far from the norm of a finite image
_RITZ_STEPS = 40
_RITZ_BYTES = 2**28  # of Lanczos vectors; chosen
_MIN_RITZ_STEPS = 8
_GRID_SLACKS = (0.005, 0.02, 0.05)  # 1 / cos - 1 per axis: the first that costs at most _WORK


@dataclass(frozen=True)
class OperatorNorm:
    """Enclosure of a spectral norm: lower <= ||T||_2 <= upper."""

    lower: float
    upper: float


def operator_norm(
    layer: nn.Module, input_size: tuple[int, int] | None, *, name: str
) -> OperatorNorm:
    """Enclose the spectral norm of a layer without its bias.

    Exact up to rounding for linear layers, patch embeddings, 1 x 1 convolutions and small
    operators.

    Args:
        layer: nn.Linear or nn.Conv2d with their own forward; parametrized weights are followed.
        input_size: Height and width of a convolution's input; not used for a linear layer.
        name: The layer's name in the network, for errors.

    Returns:
        Bounds in units of output over input.

    Raises:
        MeasurementError: If it is another kind of layer, pads with anything but zeros, does not fit
            the input, or holds NaN or infinity.
    """
    weight = applied_weight(layer, name=name)
    scale = weight.abs().max().item()
    if scale == 0:
        return OperatorNorm(0.0, 0.0)
    weight = weight / scale  # squares of huge or tiny weights must not leave float64
    if isinstance(layer, nn.Conv2d):
        lower, upper = _convolution_norm(convolution(layer, weight, _size(input_size), name=name))
    else:
        lower = upper = float(_largest_singular_values(weight))
    return OperatorNorm(scale * lower * (1 - _ROUNDING), scale * upper * (1 + _ROUNDING))


def authors_weight_norm(
    layer: nn.Module,
    input_size: tuple[int, int] | None,
    *,
    linear: Literal["spectral", "frobenius"],
    name: str,
) -> float:
    """Weight norm of the authors' code for Eq. 12.

    ||K||_F (H_out W_out)^(1/2) for a convolution, which is at least its operator norm; for a linear
    layer the spectral norm in networks without convolutions and the Frobenius norm in others.

    Args:
        layer: As in ``operator_norm``.
        input_size: As in ``operator_norm``.
        linear: Norm of linear layers.
        name: The layer's name in the network, for errors.

    Returns:
        The norm in float64.

    Raises:
        MeasurementError: As in ``operator_norm``.
    """
    weight = applied_weight(layer, name=name)
    if isinstance(layer, nn.Conv2d):
        height, width = convolution(layer, weight, _size(input_size), name=name).output_size
        return float(torch.linalg.vector_norm(weight)) * math.sqrt(height * width)
    if linear == "frobenius":
        return float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.svdvals(weight)[0])


def dense_operator(
    layer: nn.Module, input_size: tuple[int, int] | None, *, name: str
) -> torch.Tensor:
    """Matrix of a layer without its bias, on one token or one flattened image.

    Args:
        layer: As in ``operator_norm``.
        input_size: As in ``operator_norm``.
        name: The layer's name in the network, for errors.

    Returns:
        (outputs, inputs) float64; 8 bytes an entry, so for small layers.

    Raises:
        MeasurementError: As in ``operator_norm``.
    """
    weight = applied_weight(layer, name=name)
    if not isinstance(layer, nn.Conv2d):
        return weight
    operator = convolution(layer, weight, _size(input_size), name=name)
    return torch.block_diag(*(operator.dense(group) for group in range(layer.groups)))


def _size(input_size: tuple[int, int] | None) -> tuple[int, int]:
    if input_size is None:
        raise ValueError("a convolution's norm needs input_size = (height, width), found None")
    return input_size


def _convolution_norm(conv: Convolution) -> tuple[float, float]:
    """Lower and upper bound; T is block diagonal over groups, so its norm is their largest."""
    blocks = _largest_singular_values(conv.kernel.flatten(2))
    overlap = conv.rows.overlap * conv.columns.overlap
    upper = blocks * math.sqrt(overlap)
    inner = conv.rows.has_inner_patch and conv.columns.has_inner_patch
    lower = float(blocks.max()) if inner else 0.0
    if inner and overlap == 1:
        return lower, float(upper.max())

    work = min(conv.shape) ** 2 * max(conv.shape)
    small = work <= _WORK and math.prod(conv.shape) <= _DENSE_ENTRIES
    if not small or len(upper) > 1:
        upper = torch.minimum(upper, _symbol_bounds(conv))
    order: list[int] = upper.argsort(descending=True).tolist()
    if not small:
        return max(lower, _ritz_value(conv, order[0])), float(upper.max())
    for group in order[: int(_WORK // work)]:
        if upper[group] <= lower:
            break
        upper[group] = _largest_singular_values(conv.dense(group))
        lower = max(lower, float(upper[group]))
    return lower, max(lower, float(upper.max()))


def _symbol_bounds(conv: Convolution) -> torch.Tensor:
    """Certificates of the groups from the symbol on a grid, (G,)."""
    kernel = conv.phase_kernel()
    groups, outputs, inputs, taps, _ = kernel.shape
    work = groups * outputs * inputs * min(outputs, inputs) / 2
    grids = [(_grid(conv.rows, slack), _grid(conv.columns, slack)) for slack in _GRID_SLACKS]
    affordable = [grid for grid in grids if grid[0][0] * grid[1][0] * work <= _WORK]
    (rows, row_factor), (columns, column_factor) = (affordable or grids[-1:])[0]
    best = kernel.new_zeros(groups)
    # The kernel is real, so S(-w) is the conjugate of S(w): half of the rows are enough.
    for row in range(rows // 2 + 1):
        tap = torch.arange(taps, dtype=torch.float64, device=kernel.device)
        phase = torch.exp(-2j * math.pi * row / rows * tap)
        summed = torch.einsum("goiqr,q->goir", kernel.to(phase.dtype), phase)
        symbols = torch.fft.fft(summed, n=columns).permute(0, 3, 1, 2)
        gram = _gram(symbols)
        # ||S||_2^2 <= ||S^* S||_F: frequencies that cannot be the largest are passed over.
        candidates = torch.linalg.matrix_norm(gram) > best[:, None] ** 2
        values = gram.new_zeros(candidates.shape, dtype=torch.float64)
        values[candidates] = _largest_eigenvalues(gram[candidates]).sqrt()
        best = torch.maximum(best, values.amax(1))
    return best * row_factor * column_factor


def _grid(axis: Axis, slack: float) -> tuple[int, float]:
    """Number of frequencies, and what the largest value on them must be multiplied by."""
    radius = (axis.reduced_taps - 1) / 2
    size = max(math.ceil(math.pi * radius / math.acos(1 / (1 + slack))), 1)
    if axis.circle <= size:
        return axis.circle, 1.0
    return size, 1 / math.cos(math.pi * radius / size)


def _ritz_value(conv: Convolution, group: int) -> float:
    """Square root of the largest Ritz value of the smaller Gram operator of one group."""
    _, outputs, inputs, _, _ = conv.kernel.shape
    wide = conv.shape[0] <= conv.shape[1]
    size = min(conv.shape)

    def apply(vectors: torch.Tensor) -> torch.Tensor:
        if wide:
            y = vectors.reshape(-1, outputs, *conv.output_size)
            return conv.product(group, conv.transposed(group, y)).flatten(1)
        x = vectors.reshape(-1, inputs, conv.rows.size, conv.columns.size)
        return conv.transposed(group, conv.product(group, x)).flatten(1)

    def make_operator(_: np.ndarray) -> Apply:
        return apply

    start = torch.randn(1, size, dtype=torch.float64, generator=generator("operator_norm"))
    result = lanczos(
        make_operator,
        (start / start.norm()).to(conv.kernel.device),
        tolerance=_RITZ_TOLERANCE,
        failure_probability=_RITZ_TOLERANCE,  # when to stop; its upper bound is not used
        max_iterations=max(_MIN_RITZ_STEPS, min(_RITZ_STEPS, _RITZ_BYTES // (8 * size))),
    )
    return math.sqrt(float(result.lower[0]))


def _largest_singular_values(matrices: torch.Tensor) -> torch.Tensor:
    """||A||_2 of (..., m, n) real or complex matrices, (...) float64."""
    return _largest_eigenvalues(_gram(matrices)).sqrt()


def _gram(matrices: torch.Tensor) -> torch.Tensor:
    """A A^* or A^* A, the smaller one: at the top end squaring loses no digits."""
    m, n = matrices.shape[-2:]
    return matrices @ matrices.mH if m <= n else matrices.mH @ matrices


def _largest_eigenvalues(gram: torch.Tensor) -> torch.Tensor:
    """Largest eigenvalues of (..., k, k) positive semidefinite matrices, (...) float64."""
    if gram.shape[-1] == 1:
        return gram[..., 0, 0].real  # depthwise kernels have thousands of these
    return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0)
