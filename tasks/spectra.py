"""Singular values of the Jacobians at the images and at every layer's input, and their rank.

Rows (``tasks.layer_rows``) are in the network's dtype. Singular values of float32 rows come from
their Gram matrix in float64, whose floor of 1.5e-8 sigma_1 lies under the rows' own rounding; those
of float64 rows from a QR factorisation, because a Gram matrix would lose half of their digits.
Where only sigma_1 is wanted this is no dearer: Lanczos on stored rows took as long for 768 of them
and longer for 192 (one CPU thread).

Shapes: B images, N outputs, R = min(N, features of the head) rows, D inputs of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from tasks.layer_rows import GRAPH_COST, ROW_COST, num_passes, plan_rows, reduce_rows
from tasks.measurement import Batch, Subject
from tasks.outline import Outline
from tasks.self_test import self_test

_CLEAR_GAP = 10  # kept and dropped singular values one decade apart; chosen
_NOISE_FACTOR = 10  # singular values are kept above this many times the noise; chosen
# Least noise of float32 rows relative to sigma_1: null directions of a LayerNorm measured 1e-7.
_FLOAT32_NOISE = 1e-7
_BLOCK = 2**23  # numbers that are converted to float64 at once; chosen


@dataclass(frozen=True, eq=False)
class Spectra:
    """Singular values of a batch, by map: ``IMAGE`` first, then the layers in call order.

    Attributes:
        singular_values: (B, min(R, D)) float64, descending; all NaN for an image whose rows
            overflowed. Those between R and min(N, D) are exactly 0 and left out.
        noise: Rounding of the rows relative to sigma_1, for ``numerical_rank``.
        num_outputs: N.
        num_rows: R.
        constant: Linear and convolutional modules whose input does not depend on the image: they
            are no layers and have no Jacobian.
        forward_equivalents: Work per image in no-grad forwards.
    """

    singular_values: dict[str, np.ndarray]
    noise: dict[str, float]
    num_outputs: int
    num_rows: int
    constant: tuple[str, ...]
    forward_equivalents: float

    def frobenius(self, name: str) -> np.ndarray:
        """Frobenius norm of a map, (B,)."""
        return np.linalg.norm(self.singular_values[name], axis=1)


def spectra(
    subject: Subject,
    batch: Batch,
    *,
    image: bool = True,
    layers: bool = False,
    memory_gib: float = 2.0,
) -> Spectra:
    """Singular values of the Jacobians of a batch.

    Args:
        subject: The network.
        batch: Images; memory splits them further where needed.
        image: Whether to take the Jacobian with respect to the images.
        layers: Whether to take those with respect to every layer's input.
        memory_gib: Rows held at once, in GiB. Each backward pass and the graph come on top.

    Raises:
        MeasurementError: If the network fails the self-test or gives NaN logits, or if the rows of
            one image and layer take more than ``memory_gib``.
    """
    defect = self_test(subject).defect
    plan = plan_rows(subject, batch, image=image, layers=layers, memory_gib=memory_gib)
    found = reduce_rows(
        subject, batch, plan, lambda _name, _samples, rows, scale: _values(rows, scale)
    )
    num_outputs = batch.targets.shape[1]
    noise = {
        name: row_noise(batch.inputs.dtype, defect, num_outputs, size)
        for name, size in plan.sizes.items()
    }
    return Spectra(
        singular_values=found,
        noise=noise,
        num_outputs=num_outputs,
        num_rows=plan.num_rows,
        constant=plan.constant,
        forward_equivalents=plan.forward_equivalents,
    )


def predicted_cost(
    network: Outline, *, image: bool = True, layers: bool = False, memory_gib: float = 2.0
) -> float:
    """No-grad forwards that the spectra of one image take, passes of groups of rows included."""
    sizes = [math.prod(network.data_config["input_size"])] if image else []
    sizes += [layer.input_size for layer in network.layers] if layers else []
    rows = network.jacobian_rows
    # A Gram matrix has 2 R^2 D operations, which take twice as long in float64 as a forward's.
    algebra = 4 * rows**2 * sum(sizes) / network.forward_flops
    return GRAPH_COST + ROW_COST * rows * num_passes(sizes, rows, memory_gib) + algebra


def numerical_rank(singular_values: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Number of singular values that are more than rounding, and whether the cut is clear.

    Args:
        singular_values: (..., K), descending.
        noise: Rounding relative to the largest.

    Returns:
        rank: (...,) int, of those above ten times ``noise`` times the largest. 0 for NaN.
        clear: (...,) bool, whether the smallest kept is at least ten times the largest dropped.
            True where all or none are kept.
    """
    s = np.asarray(singular_values, dtype=np.float64)
    rank = (s > _NOISE_FACTOR * noise * s[..., :1]).sum(-1)
    padded = np.concatenate([s, np.zeros_like(s[..., :1])], axis=-1)
    dropped = np.take_along_axis(padded, rank[..., None], -1)[..., 0]
    kept = np.take_along_axis(s, np.maximum(rank - 1, 0)[..., None], -1)[..., 0]
    return rank, (rank == 0) | (kept >= _CLEAR_GAP * dropped)


def row_noise(dtype: torch.dtype, defect: float, num_outputs: int, num_inputs: int) -> float:
    """Rounding of Jacobian rows relative to sigma_1.

    Args:
        dtype: Of the network.
        defect: Of the network's products, from the self-test.
        num_outputs: N.
        num_inputs: D.
    """
    if dtype == torch.float64:
        return max(defect, max(num_outputs, num_inputs) * float(np.finfo(np.float64).eps))
    return max(defect, _FLOAT32_NOISE)


def _values(rows: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """Singular values of scaled rows, in float64.

    Args:
        rows: (B, R, D), float32 or float64. May be overwritten.
        scale: (B, R) float64 factors of the rows.

    Returns:
        (B, min(R, D)) descending, NaN where a row is not finite.
    """
    size = min(rows.shape[1:])
    finite = torch.isfinite(rows).flatten(1).all(1)
    values = rows.new_full((len(rows), size), torch.nan, dtype=torch.float64)
    chosen = rows if bool(finite.all()) else rows[finite]
    if not len(chosen):
        return values.cpu().numpy()
    relative, unit = _relative(scale[finite])
    if rows.dtype == torch.float64:
        chosen.mul_(relative[:, :, None])
        triangle = torch.linalg.qr(chosen.mT, mode="r").R
        found = torch.linalg.svdvals(triangle)
    else:
        found = torch.linalg.eigvalsh(_gram(chosen, relative)).clamp(min=0).sqrt().flip(1)[:, :size]
    values[finite] = found * unit
    return values.cpu().numpy()


def _gram(rows: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
    """Gram matrices of scaled rows, (B, R, R) float64, block by block of columns."""
    count, num_rows, size = rows.shape
    gram = relative.new_zeros((count, num_rows, num_rows))
    step = max(1, _BLOCK // (count * num_rows))
    for start in range(0, size, step):
        block = rows[:, :, start : start + step].double()
        gram.baddbmm_(block, block.mT)
    return gram * relative[:, :, None] * relative[:, None, :]


def _relative(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (B, R) relative to the largest of each image, and the largest, (B, 1).

    Saturated outputs have slopes of 1e-200, whose squares would underflow in a Gram matrix.
    """
    unit = scale.amax(1, keepdim=True)
    return scale / unit, unit
