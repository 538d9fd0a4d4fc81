"""Maximum local sensitivity: the largest singular value of each image's input Jacobian.

For image i with J_i = d f(x_i) / d x_i (Eq. 11, 47):

    mls             = mean_i sigma_1(J_i)                  units [f] / [x]
    normalized_mls  = mean_i ||x_i||^2 sigma_1(J_i)^2      units [f]^2

x is the tensor that is fed to the network, after preprocessing. Every image gets an interval for
its sigma_1: Lanczos with a certificate that fails with at most ``failure_probability``, widened on
both sides by four times the rounding defect of the network's products (``tasks.self_test``, from
two images, so that part is a measured allowance and not a proof).

It does not compute the layer-wise sum NMLS (Eq. 12) nor the input-invariant form (Eq. 43).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pydantic
import torch

from tasks.adversarial import NUM_STEPS, adversarial_ratios
from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.certified import Certified, certified_sigma, unit_starts
from tasks.finite import checked_jacobian, require_finite
from tasks.jacobian import DOUBLE_GRAPH_COST, JVP_COST, VJP_COST, dense_jacobian, forward
from tasks.lanczos import Apply, power_iteration
from tasks.measurement import (
    Batch,
    Columns,
    Estimate,
    Measurement,
    Row,
    Status,
    Subject,
)
from tasks.outline import Outline
from tasks.random import generator
from tasks.sample_mean import sample_mean
from tasks.self_test import self_test

# Costs in no-grad forwards of one image, measured on ViT-Ti and ViT-S (CPU, batch 8).
_STEP_COST = VJP_COST + JVP_COST
_ROW_COST = 1.25  # one transposed product on a single graph
_MATH_FORWARD_COST = 1.06
_FORWARD_BACKWARD_COST = 2.2

_ALLOWANCE = 4  # interval widening in units of the self-test's defect; chosen
_TYPICAL_STEPS = 14  # trained ViTs need 11 to 13 for tolerance 1e-3 at 1e-9
_DENSE_BYTES = 2**30  # rows of a dense Jacobian held at once; chosen


class NormalizedMls(Measurement):
    """Settings of the maximum local sensitivity and its input-normalised square.

    Attributes:
        method: ``lanczos`` is certified. ``power`` (gradient ascent on ||J v||^2) has a lower
            bound and a residual only. ``dense`` forms all rows of J and is exact up to rounding.
            ``authors`` is the recipe of the paper's code (30 Adam steps on a finite perturbation):
            neither a bound nor convergent, for comparison.
        tolerance: Relative width of the interval of sigma_1 (``lanczos``) or relative residual of
            the eigenvalue (``power``). Intervals of ``normalized_mls`` are twice as wide.
        failure_probability: Chance, per image, that the certificate's upper bound is too small.
        max_iterations: Products per image; a wider interval is reported as not converged.
    """

    metric: ClassVar[str] = "normalized_mls"
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = ("normalized_mls", "mls")

    method: Literal["lanczos", "power", "dense", "authors"] = "lanczos"
    tolerance: float = pydantic.Field(default=1e-3, gt=0, lt=1)
    failure_probability: float = pydantic.Field(default=1e-9, gt=0, lt=1)
    max_iterations: int = pydantic.Field(default=64, ge=1)

    @property
    def alignment(self) -> int:
        """Batches start at multiples of their size, so units of 32 cut none of 1, 2, 4 ... 32.

        With other batch sizes a unit boundary may cut a batch, which changes rounding only.
        """
        return 32

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Two rows per image; work and time are on the ``normalized_mls`` row of the pair.

        Raises:
            MeasurementError: If the network fails the self-test or gives NaN for an image.
        """
        defect = _ALLOWANCE * self_test(subject).defect
        method = _METHODS[self.method]
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            result = method(self, subject, batch, defect)
            norms = batch.inputs.detach().double().flatten(1).norm(dim=1).cpu().numpy()
            seconds = (time.perf_counter() - started) / len(chunk)
            for i, sample in enumerate(batch.samples):
                rows += _rows(result, i, sample, float(norms[i]), seconds)
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Means over images with Student intervals (95 %).

        An image whose value is NaN (overflow) is not left out: it makes the estimate NaN, with
        status ``not_finite``.
        """
        return [sample_mean(rows, quantity) for quantity in self.quantities]

    def forward_equivalents(self, network: Outline) -> float:
        """Predicted work per image, from ``_TYPICAL_STEPS`` where it depends on the network."""
        steps = min(self.max_iterations, network.num_outputs, _TYPICAL_STEPS)
        return {
            "lanczos": DOUBLE_GRAPH_COST + _STEP_COST * steps,
            "power": DOUBLE_GRAPH_COST + _STEP_COST * self.max_iterations,
            "dense": _MATH_FORWARD_COST + _ROW_COST * network.num_outputs,
            "authors": 1 + _FORWARD_BACKWARD_COST * NUM_STEPS,
        }[self.method]


@dataclass(frozen=True, eq=False)
class _Sigmas:
    """Largest singular values of a batch; arrays are (B,), bounds NaN where there are none."""

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    converged: np.ndarray
    num_iterations: np.ndarray
    num_probes: int
    forward_equivalents: np.ndarray


def _by_lanczos(settings: NormalizedMls, subject: Subject, batch: Batch, defect: float) -> _Sigmas:
    found = certified_sigma(
        functools.partial(_operator, subject, batch),
        _starts(subject, batch),
        defect=defect,
        tolerance=settings.tolerance,
        failure_probability=settings.failure_probability,
        max_iterations=settings.max_iterations,
    )
    return _iterated(found)


def _by_power(settings: NormalizedMls, subject: Subject, batch: Batch, defect: float) -> _Sigmas:
    found = power_iteration(
        functools.partial(_operator, subject, batch),
        _starts(subject, batch),
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
    )
    value = np.sqrt(np.maximum(found.lower, 0))
    lower = np.maximum(value * (1 - defect), 0)
    return _iterated(Certified(value, lower, found.upper, found.converged, found.num_iterations))


def _by_dense(settings: NormalizedMls, subject: Subject, batch: Batch, defect: float) -> _Sigmas:
    """From all rows; the top eigenvalue of the float64 Gram matrix loses no relevant digit."""
    with torch.no_grad():
        logits = forward(subject.model, batch.inputs.clone())
    require_finite(subject.model, batch.inputs, logits, batch.samples)
    num_outputs = logits.shape[1]
    at_once = max(1, _DENSE_BYTES // (8 * num_outputs * batch.inputs[0].numel()))
    values = []
    for images in batch.inputs.split(at_once):
        rows = dense_jacobian(subject.model, images, subject.output).flatten(2)
        grams = (rows @ rows.mT).cpu()
        finite = torch.isfinite(grams).flatten(1).all(1)  # eigvalsh raises on anything else
        largest = torch.full_like(grams[:, 0, 0], torch.nan)
        largest[finite] = torch.linalg.eigvalsh(grams[finite])[:, -1]
        values.append(largest.clamp(min=0).sqrt())
    value = torch.cat(values).numpy()
    count = np.full(len(value), num_outputs)
    lower, upper = np.maximum(value * (1 - defect), 0), value * (1 + defect)
    cost = _MATH_FORWARD_COST + _ROW_COST * count
    return _Sigmas(value, lower, upper, np.ones(len(value), dtype=bool), count, 0, cost)


def _by_authors(settings: NormalizedMls, subject: Subject, batch: Batch, defect: float) -> _Sigmas:
    images = batch.inputs.detach()
    with torch.no_grad():
        logits = forward(subject.model, images.clone())
    require_finite(subject.model, images, logits, batch.samples)
    generators = [generator(subject.seed, "authors_mls", sample) for sample in batch.samples]
    value = adversarial_ratios(subject.model, images, subject.output, generators).cpu().numpy()
    unknown = np.full(len(value), np.nan)
    steps = np.full(len(value), NUM_STEPS)
    cost = 1 + _FORWARD_BACKWARD_COST * steps
    return _Sigmas(value, unknown, unknown, np.ones(len(value), dtype=bool), steps, 1, cost)


_METHODS: dict[str, Callable[[NormalizedMls, Subject, Batch, float], _Sigmas]] = {
    "lanczos": _by_lanczos,
    "power": _by_power,
    "dense": _by_dense,
    "authors": _by_authors,
}


def _operator(subject: Subject, batch: Batch, active: np.ndarray) -> Apply:
    """The product u -> J J^T u for some images of a batch."""
    return checked_jacobian(subject, batch.part(active)).gram


def _starts(subject: Subject, batch: Batch) -> torch.Tensor:
    """One start per image on the unit sphere of outputs, (B, N) float64, keyed by the sample."""
    generators = [generator(subject.seed, "normalized_mls", sample) for sample in batch.samples]
    return unit_starts(generators, batch.targets)


def _iterated(found: Certified) -> _Sigmas:
    cost = DOUBLE_GRAPH_COST + _STEP_COST * found.num_iterations
    return _Sigmas(
        found.value, found.lower, found.upper, found.converged, found.num_iterations, 1, cost
    )


def _rows(result: _Sigmas, i: int, sample: int, norm: float, seconds: float) -> list[Row]:
    """The pair of rows of image i of a batch."""
    sigma, lower, upper = (float(x[i]) for x in (result.value, result.lower, result.upper))
    normalized = (norm * sigma) ** 2
    status = Status.OK if result.converged[i] else Status.NOT_CONVERGED
    if not np.isfinite(normalized):
        status = Status.NOT_FINITE

    work = float(result.forward_equivalents[i])

    def row(quantity: str, factor: float, power: int, work: float, seconds: float) -> Row:
        return Row(
            quantity=quantity,
            value=(factor * sigma) ** power,
            sample=sample,
            lower=(factor * lower) ** power if np.isfinite(lower) else None,
            upper=(factor * upper) ** power if np.isfinite(upper) else None,
            status=status,
            num_iterations=int(result.num_iterations[i]),
            num_probes=result.num_probes,
            forward_equivalents=work,
            seconds=seconds,
        )

    return [row("normalized_mls", norm, 2, work, seconds), row("mls", 1.0, 1, 0.0, 0.0)]
