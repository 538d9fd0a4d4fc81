"""Certified largest singular values of a batch of operators, rounding of their products included.

Lanczos' interval for sigma_1 is widened on both sides by an allowance for the rounding of the
products, which a self-test has measured; so it stops earlier by the share that rounding takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tasks.lanczos import Apply, lanczos
from tasks.random import normal_vectors


@dataclass(frozen=True, eq=False)
class Certified:
    """Arrays (B,): sigma_1, its interval, whether that is narrow enough, and products spent."""

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    converged: np.ndarray
    num_iterations: np.ndarray


def certified_sigma(
    make_operator: Callable[[np.ndarray], Apply],
    starts: torch.Tensor,
    *,
    defect: float,
    tolerance: float,
    failure_probability: float,
    max_iterations: int,
) -> Certified:
    """Largest singular values of A from the products u -> A A^T u.

    Args:
        make_operator: As in ``lanczos``.
        starts: (B, N) float64, ``unit_starts``.
        defect: Relative rounding of the products that is allowed for.
        tolerance: Relative width of the interval, rounding included.
        failure_probability: Chance, per operator, that the upper end is too small.
        max_iterations: Products per operator at most.
    """
    # The interval is [root (1 - defect), root_upper (1 + defect)]; its width relative to the root
    # must be within the tolerance. Where rounding alone exceeds it more steps cannot help.
    available = (tolerance - 2 * defect) / (1 + defect)
    found = lanczos(
        make_operator,
        starts,
        tolerance=available if available > 0 else tolerance,
        failure_probability=failure_probability,
        max_iterations=max_iterations,
    )
    value = np.sqrt(found.lower)
    lower, upper = np.maximum(value * (1 - defect), 0), np.sqrt(found.upper) * (1 + defect)
    narrow = upper - lower <= tolerance * value * (1 + 1e-9)  # rounding of this line
    return Certified(value, lower, upper, narrow, found.num_iterations)


def unit_starts(generators: Sequence[torch.Generator], like: torch.Tensor) -> torch.Tensor:
    """One start per operator, uniform on the unit sphere: (B, N) float64.

    Args:
        generators: One per operator, on the CPU.
        like: (B, N) tensor on the device of the products.
    """
    normals = normal_vectors(generators, like.shape[1])
    return torch.nn.functional.normalize(normals, dim=1).to(like.device)
