"""Squared Frobenius norms and participation ratios of J diag(w), by sampling (``tasks.deflated``).

Shared by the measurements of the input Jacobian's whole spectrum. w weights the input scalars: 1,
or the image itself for the input-invariant norm.

Shapes: B images, N outputs, M input scalars.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tasks.deflated import PROBES, STEPS, deflated_moments
from tasks.finite import checked_jacobian
from tasks.jacobian import DOUBLE_GRAPH_COST, JVP_COST, VJP_COST, JacobianBatch, unit_scale
from tasks.measurement import Batch, Status, Subject
from tasks.random import generator

# Up to here all rows cost no more than probes to 2 %; chosen.
FEW_ROWS = 64
# Probes to 2 %: trained ViTs need 16 to 24, one at random initialisation 48.
_TYPICAL_PROBES = 24


@dataclass(frozen=True, eq=False)
class JacobianMoments:
    """Estimates per image, each array (B,): see ``tasks.deflated.Moments``.

    Attributes:
        norm_squared: ||J diag(w)||_F^2.
        ratio: (sum s^2)^2 / sum s^4 over its singular values s.
    """

    norm_squared: np.ndarray
    norm_squared_stderr: np.ndarray
    ratio: np.ndarray
    ratio_stderr: np.ndarray
    num_probes: np.ndarray
    num_steps: np.ndarray
    converged: np.ndarray
    forward_equivalents: np.ndarray


def jacobian_moments(
    subject: Subject,
    batch: Batch,
    *,
    metric: str,
    weight: torch.Tensor | None,
    ratio: bool,
    target_relative_stderr: float,
    max_draws: int,
) -> JacobianMoments:
    """Sample a batch until every image meets the target or has had ``max_draws`` probes.

    Args:
        subject: The network.
        batch: Images.
        metric: Part of the random key, beside the seed and the sample.
        weight: (B, M) factors of the input scalars, None for ones.
        ratio: Whether the target holds for the ratio too, or for the norm alone.
        target_relative_stderr: Standard error over value, per image.
        max_draws: Probes per image at most; max_draws * M scalars per image are held.

    Raises:
        MeasurementError: If logits are NaN or infinite, or are not one per class of the data set.
    """
    unit = np.ones(len(batch.samples))

    def make(active: np.ndarray) -> _WeightedJacobian:
        jacobian = checked_jacobian(subject, batch.part(active))
        operator = _WeightedJacobian(
            jacobian, unit_scale(jacobian.slope), None if weight is None else weight[active]
        )
        unit[active] = operator.unit.cpu().numpy()
        return operator

    found = deflated_moments(
        make,
        [generator(subject.seed, metric, sample) for sample in batch.samples],
        batch.inputs,
        size=batch.targets.shape[1],
        ratio=ratio,
        target_relative_stderr=target_relative_stderr,
        max_draws=max_draws,
    )
    return JacobianMoments(
        norm_squared=found.trace * unit**2,
        norm_squared_stderr=found.trace_stderr * unit**2,
        ratio=found.ratio,
        ratio_stderr=found.ratio_stderr,
        num_probes=found.num_probes,
        num_steps=found.num_steps,
        converged=found.converged,
        forward_equivalents=DOUBLE_GRAPH_COST * found.num_operators
        + (VJP_COST + JVP_COST) * found.num_steps
        + VJP_COST * found.num_probes,
    )


def probed_status(value: float, *, converged: bool) -> Status:
    """Status of one image's estimate."""
    if not np.isfinite(value):
        return Status.NOT_FINITE
    return Status.OK if converged else Status.TARGET_NOT_REACHED


def predicted_cost(max_draws: int) -> float:
    """Forwards per image of ``jacobian_moments`` on a typical network."""
    probes = min(max_draws, _TYPICAL_PROBES)
    steps = probes * STEPS / PROBES
    return DOUBLE_GRAPH_COST + (VJP_COST + JVP_COST) * steps + VJP_COST * probes


@dataclass(frozen=True, eq=False)
class _WeightedJacobian:
    """The operators J diag(w) / unit.

    Attributes:
        unit: (B,) float64, powers of two near the largest slope: products of saturated networks
            stay inside float32.
        weight: (B, M) in the dtype of the images, or None for ones.
    """

    jacobian: JacobianBatch
    unit: torch.Tensor
    weight: torch.Tensor | None

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        return self._weighted(self.jacobian.vjp(u / self.unit[:, None]).flatten(1))

    def gram(self, u: torch.Tensor) -> torch.Tensor:
        direction = self.jacobian.vjp(u / self.unit[:, None])
        twice = self._weighted(self._weighted(direction.flatten(1)))
        return self.jacobian.jvp(twice.reshape(direction.shape)) / self.unit[:, None]

    def _weighted(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.weight is None else rows * self.weight
