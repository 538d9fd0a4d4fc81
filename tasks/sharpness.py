"""Sharpness: mean squared Frobenius norm of the parameter Jacobian (Eq. 3), layer by layer too.

For image i, with J_i = d f(x_i) / d theta over all trainable parameters,

    sharpness         = mean_i ||J_i||_F^2                                units [f]^2 (parameters 1)
    sharpness_sqrt    = its square root, what the paper's figures show
    layer_sharpness   = mean_i || d f / d W_l ||_F^2 = S_l, of a layer's weight alone
    untied_sharpness  = mean_i sum_l ||d f / d z_l||_F^2 ||x_l||^2
    matrix_normalized_sharpness = sum_l ||W_l||_2 S_l^(1/2)               (right side of Eq. 35)

Sharpness is the trace of the Hessian of the loss 1/(2n) sum_i ||f(x_i) - y_i||^2 where the network
interpolates, and everywhere if it is piecewise linear in each single parameter (ReLU networks
without normalisation layers); elsewhere ``hessian_trace`` tells the difference. It needs no labels.
torch's ``MSELoss()`` is 2/N times that loss, and so is its Hessian.

``untied_sharpness`` is the sharpness of the same function with a weight of its own at every token
and patch and in every call (weights as they are applied, alone). It is what bounds the compression
of networks with shared weights; for networks without, it is the sum of ``layer_sharpness``.

Norms of convolutions are enclosed, and the interval of ``matrix_normalized_sharpness`` with them.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import pydantic
import torch

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.exact_norms import jacobian_norms, rows_at_once
from tasks.head import subject_head
from tasks.layer_rows import GRAPH_COST, checked_graph, num_rows
from tasks.matrix_normalized import LAYER_SHARPNESS, matrix_normalized, norm_row
from tasks.measurement import Batch, Columns, Estimate, Measurement, Row, Status, Subject
from tasks.outline import Outline
from tasks.parameter_norms import NORMS_COST, check_coverage, parameter_norms
from tasks.random import generator
from tasks.sample_mean import layer_means, sample_mean

_MAX_EXACT_ROWS = 32  # more rows than that buy less than more images would; chosen

_NAME = "sharpness"
_UNTIED = "untied_sharpness"


class Sharpness(Measurement):
    """Settings of the sharpness of Eq. 3.

    Attributes:
        method: ``exact`` spends a backward pass per output, or per feature of a linear head if they
            are fewer. ``hutchinson`` uses random signs of the outputs: unbiased. ``auto`` is exact
            for up to 32 rows.
        num_probes: Random vectors per image (``hutchinson``). Two tell probes from images.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (
        _NAME, "sharpness_sqrt", _UNTIED, "matrix_normalized_sharpness",
    )  # fmt: skip

    method: Literal["auto", "exact", "hutchinson"] = "auto"
    num_probes: int = pydantic.Field(default=2, ge=1)

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Rows per image for the whole network, and per image and layer.

        Layers' norms come with sample 0. A layer that changes its weight on the way (weight
        standardisation, a module called twice) counts in the totals and has no row of its own but
        a norm of NaN.

        Raises:
            MeasurementError: If a parameter's gradient is not covered, or the network gives NaN.
        """
        check_coverage(subject)
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            rows += self._batch_rows(subject, chunk)
        return rows

    def _batch_rows(self, subject: Subject, samples: range) -> list[Row]:
        started = time.perf_counter()
        batch = subject.batch(samples)
        graph = checked_graph(subject, batch, parameters=True)
        head = subject_head(subject, batch.inputs)
        at_once = rows_at_once(graph)
        lengths = torch.stack([x.double().square().flatten(1).sum(1) for x in graph.inputs])
        if self._is_exact(num_rows(subject, batch)):
            exact = jacobian_norms(graph, head, at_once=at_once)
            total, weights = exact.total[None], exact.weights[None]
            untied = exact.outputs[None] * lengths
            passes, num_probes = exact.num_rows, 0
        else:
            probes = _signs(subject, batch, self.num_probes).to(graph.slope.device)
            norms = parameter_norms(graph, probes, at_once=at_once)
            total, weights, untied = norms.total, norms.weights, norms.outputs * lengths
            passes = num_probes = self.num_probes
        untied_total = untied.sum(1)
        seconds = (time.perf_counter() - started) / len(samples)
        row = partial(_row, num_probes=num_probes, dtype=graph.logits.dtype)
        rows: list[Row] = []
        for i, sample in enumerate(samples):
            work = GRAPH_COST + NORMS_COST * passes
            rows.append(row(_NAME, total[:, i], sample, work=work, seconds=seconds))
            rows.append(row(_UNTIED, untied_total[:, i], sample))
            rows += [
                row(LAYER_SHARPNESS, weights[:, k, i], sample, layer=layer.name)
                for k, layer in enumerate(graph.layers)
                if layer.owns_parameters
            ]
        if 0 in samples:
            rows += [norm_row(layer) for layer in graph.layers]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Means over images, their root by the delta method, and the layers' means.

        ``stderr_draws`` is the part of the standard error that the probes make.
        """
        total = sample_mean(rows, _NAME)
        return [
            total,
            _root(total),
            sample_mean(rows, _UNTIED),
            matrix_normalized(rows),
            *layer_means(rows, LAYER_SHARPNESS),
        ]

    def forward_equivalents(self, network: Outline) -> float:
        """Backward passes per image, each to all layers and parameters."""
        exact = self._is_exact(network.jacobian_rows)
        return GRAPH_COST + NORMS_COST * (network.jacobian_rows if exact else self.num_probes)

    def note(self, network: Outline) -> str:
        """What ``auto`` chose."""
        rows = network.jacobian_rows
        if self.method != "auto":
            return ""
        if self._is_exact(rows):
            return f"exact: {rows} backward passes per image"
        return f"hutchinson: {self.num_probes} random vectors per image instead of {rows} rows"

    def _is_exact(self, num_rows: int) -> bool:
        return self.method == "exact" or (self.method == "auto" and num_rows <= _MAX_EXACT_ROWS)


def _signs(subject: Subject, batch: Batch, count: int) -> torch.Tensor:
    """Random signs (R, B, N) float64, keyed by the sample and the probe."""
    size = batch.targets.shape[1]
    bits = [
        torch.randint(2, (size,), generator=generator(subject.seed, _NAME, sample, probe))
        for probe in range(count)
        for sample in batch.samples
    ]
    return 2 * torch.stack(bits).double().unflatten(0, (count, -1)) - 1


def _row(
    quantity: str,
    values: torch.Tensor,
    sample: int,
    *,
    num_probes: int,
    dtype: torch.dtype,
    layer: str | None = None,
    work: float = 0.0,
    seconds: float = 0.0,
) -> Row:
    """Row of (R,) probes: their mean and its standard error; or of one exact value.

    Rounding of float32 products is not bounded, so there is no interval.
    """
    value = float(values.mean())
    stderr = float(values.std() / len(values) ** 0.5) if num_probes > 1 else None
    finite = math.isfinite(value)
    bound = value if finite and not num_probes and dtype == torch.float64 else None
    return Row(
        quantity=quantity,
        value=value,
        sample=sample,
        layer=layer,
        stderr=stderr,
        lower=bound,
        upper=bound,
        status=Status.OK if finite else Status.NOT_FINITE,
        num_probes=num_probes,
        forward_equivalents=work,
        seconds=seconds,
    )


def _root(estimate: Estimate) -> Estimate:
    """Square root of an estimate, errors by the delta method."""
    root = math.sqrt(max(estimate.value, 0.0)) if math.isfinite(estimate.value) else math.nan
    factor = 1 / (2 * root) if root else math.nan
    half = factor * (estimate.ci_high - estimate.value)
    return replace(
        estimate,
        quantity="sharpness_sqrt",
        value=root,
        stderr=factor * estimate.stderr,
        stderr_draws=factor * estimate.stderr_draws,
        error_bound=factor * estimate.error_bound,
        ci_low=root - half,
        ci_high=root + half,
    )
