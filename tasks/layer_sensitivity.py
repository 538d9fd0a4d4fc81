"""Layer-wise maximum local sensitivity: sigma_1 at every layer's input, and their sum over layers.

For image i and layer l, with the path derivative J_l W_l = d f / d x_l through layer l alone:

    layer_mls = mean_i sigma_1(J_l W_l)                    units [f] / [x_l]
    nmls      = sum_l mean_i sigma_1(J_l W_l)              (Eq. 12; a sum, not a mean)

Layers are the calls of linear and convolutional modules whose input depends on the image. Where an
activation also feeds a skip connection, autograd's total derivative is another quantity, for which
the bound of Eq. 12 is false.

Every number has an interval: Lanczos' certificate, or the value itself where all rows are known,
widened by four times the rounding defect of the network's products (``tasks.self_test``). The
interval of ``nmls`` is the sum of the layers' intervals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pydantic
import torch

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.certified import certified_sigma, unit_starts
from tasks.layer_graph import LayerGraph
from tasks.layer_rows import (
    GRAPH_COST,
    ROW_COST,
    checked_graph,
    memory_text,
    network_layers,
    num_rows,
)
from tasks.measurement import Batch, Columns, Estimate, Measurement, Row, Status, Subject
from tasks.outline import Outline
from tasks.random import generator
from tasks.sample_mean import layer_means, sample_mean
from tasks.self_test import self_test
from tasks.spectra import predicted_cost, spectra

_ALLOWANCE = 4  # interval widening in units of the self-test's defect; chosen
_TYPICAL_STEPS = 14  # trained ViTs need 11 to 13 for tolerance 1e-3 at 1e-9
# One product and its transpose from the middle of the network to its end, and their graph, in
# no-grad forwards of one image (half of what they cost from the input).
_STEP_COST = 1.3
_PULLBACK_COST = 0.6
# Rows of one layer and image above this are left to Lanczos by ``auto``. Not a setting: that would
# make numbers depend on the machine.
_AUTO_BYTES = 2 * 2**30


class Nmls(Measurement):
    """Settings of the layer-wise sensitivities and their sum.

    Attributes:
        method: ``exact`` computes all rows of every layer's Jacobian, one set of backward passes
            for all layers. ``lanczos`` has a certificate per layer and holds no rows. ``auto``
            takes ``exact`` where it is cheaper by the network's sizes: for fifty layers, up to
            some 700 rows.
        tolerance: Relative width of the interval of each sigma_1 (``lanczos``).
        failure_probability: Chance, per image and layer, that the upper end is too small
            (``lanczos``).
        max_iterations: Products per image and layer (``lanczos``); a wider interval is reported as
            not converged.
        memory_gib: Rows held at once, in GiB (``exact``). Less memory means more passes.
    """

    metric: ClassVar[str] = "nmls"
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = ("nmls",)
    coverage_fields: ClassVar[frozenset[str]] = frozenset({"memory_gib"})

    method: Literal["auto", "exact", "lanczos"] = "auto"
    tolerance: float = pydantic.Field(default=1e-3, gt=0, lt=1)
    failure_probability: float = pydantic.Field(default=1e-9, gt=0, lt=1)
    max_iterations: int = pydantic.Field(default=64, ge=1)
    memory_gib: float = pydantic.Field(default=2.0, gt=0)

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """A row ``layer_mls`` per image and layer, and their sum ``nmls`` with work and time.

        A module on a constant input has one ``layer_mls`` row, NaN with status ``constant_input``,
        at sample 0.

        Raises:
            MeasurementError: If the network fails the self-test, gives NaN for an image, has no
                layer, or the rows of one layer and image take more than ``memory_gib``.
        """
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            found = _METHODS[self._chosen(subject, batch)](self, subject, batch)
            seconds = (time.perf_counter() - started) / len(chunk)
            for i, sample in enumerate(batch.samples):
                rows += _image_rows(found, i, sample, seconds)
            if 0 in chunk:
                rows += [_constant_row(name) for name in network_layers(subject)[1]]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Means over images with Student intervals (95 %), of the sum and of every layer."""
        return [sample_mean(rows, "nmls"), *layer_means(rows, "layer_mls")]

    def forward_equivalents(self, network: Outline) -> float:
        """Predicted work per image."""
        sizes = [layer.input_size for layer in network.layers]
        method = self._resolved(network.jacobian_rows, sizes, network.num_outputs)
        if method == "exact":
            return predicted_cost(network, image=False, layers=True, memory_gib=self.memory_gib)
        return _lanczos_cost(len(sizes), self._steps(network.num_outputs))

    def note(self, network: Outline) -> str:
        """The method that ``auto`` takes, and what the rows of the largest layer need."""
        rows, sizes = network.jacobian_rows, [layer.input_size for layer in network.layers]
        if not sizes or self._resolved(rows, sizes, network.num_outputs) == "lanczos":
            return f"Lanczos on {len(sizes)} layers"
        return (
            f"{rows} exact rows through {len(sizes)} layers, "
            f"the largest take {memory_text(rows, max(sizes))}"
        )

    def _chosen(self, subject: Subject, batch: Batch) -> str:
        layers, _ = network_layers(subject)
        sizes = [int(np.prod(layer.input_shape)) for layer in layers]
        return self._resolved(num_rows(subject, batch), sizes, batch.targets.shape[1])

    def _resolved(self, rows: int, sizes: list[int], num_outputs: int) -> str:
        """``exact`` or ``lanczos``: a function of the network's sizes and the settings alone."""
        if self.method != "auto":
            return self.method
        if sizes and 4 * rows * max(sizes) > _AUTO_BYTES:
            return "lanczos"
        exact = GRAPH_COST + ROW_COST * rows
        certified = _lanczos_cost(len(sizes), self._steps(num_outputs))
        return "exact" if exact <= certified else "lanczos"

    def _steps(self, num_outputs: int) -> int:
        return min(self.max_iterations, num_outputs, _TYPICAL_STEPS)


@dataclass(frozen=True, eq=False)
class _Sigmas:
    """Largest singular values of a batch by layer, each (B,), and work per image (B,)."""

    value: dict[str, np.ndarray]
    lower: dict[str, np.ndarray]
    upper: dict[str, np.ndarray]
    converged: dict[str, np.ndarray]
    num_iterations: dict[str, np.ndarray]
    num_probes: int
    forward_equivalents: np.ndarray


def _by_rows(settings: Nmls, subject: Subject, batch: Batch) -> _Sigmas:
    defect = _ALLOWANCE * self_test(subject).defect
    found = spectra(subject, batch, image=False, layers=True, memory_gib=settings.memory_gib)
    value = {name: s[:, 0] for name, s in found.singular_values.items()}
    count = len(batch.samples)
    return _Sigmas(
        value=value,
        lower={name: sigma * max(0.0, 1 - defect) for name, sigma in value.items()},
        upper={name: sigma * (1 + defect) for name, sigma in value.items()},
        converged={name: np.ones(count, dtype=bool) for name in value},
        num_iterations={name: np.full(count, found.num_rows) for name in value},
        num_probes=0,
        forward_equivalents=np.full(count, found.forward_equivalents),
    )


def _by_lanczos(settings: Nmls, subject: Subject, batch: Batch) -> _Sigmas:
    defect = _ALLOWANCE * self_test(subject).defect
    graph = checked_graph(subject, batch)
    result = _Sigmas({}, {}, {}, {}, {}, 1, np.full(len(batch.samples), GRAPH_COST))
    for k, layer in enumerate(graph.layers):
        generators = [generator(subject.seed, "nmls", i, layer.name) for i in batch.samples]
        found = certified_sigma(
            _operators(graph, k),
            unit_starts(generators, batch.targets),
            defect=defect,
            tolerance=settings.tolerance,
            failure_probability=settings.failure_probability,
            max_iterations=settings.max_iterations,
        )
        result.value[layer.name], result.lower[layer.name] = found.value, found.lower
        result.upper[layer.name], result.converged[layer.name] = found.upper, found.converged
        result.num_iterations[layer.name] = found.num_iterations
        # Images that are done stay in the batch: a graph without them would cost more.
        result.forward_equivalents[:] += _PULLBACK_COST + _STEP_COST * found.num_iterations.max()
    return result


_METHODS: dict[str, Callable[[Nmls, Subject, Batch], _Sigmas]] = {
    "exact": _by_rows,
    "lanczos": _by_lanczos,
}


def _operators(
    graph: LayerGraph, layer: int
) -> Callable[[np.ndarray], Callable[[torch.Tensor], torch.Tensor]]:
    """The products of some images, on the graph of all of them."""
    gram = graph.gram(layer)

    def make(active: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
        def apply(u: torch.Tensor) -> torch.Tensor:
            everything = torch.zeros_like(graph.slope)
            everything[active] = u
            return gram(everything)[active]

        return apply

    return make


def _lanczos_cost(num_layers: int, steps: int) -> float:
    return GRAPH_COST + num_layers * (_PULLBACK_COST + _STEP_COST * steps)


def _image_rows(found: _Sigmas, i: int, sample: int, seconds: float) -> list[Row]:
    """The rows of image i of a batch: its layers, then their sum."""
    layers = [
        Row(
            quantity="layer_mls",
            layer=name,
            value=float(value[i]),
            sample=sample,
            lower=_bound(found.lower[name][i]),
            upper=_bound(found.upper[name][i]),
            status=_status(float(value[i]), bool(found.converged[name][i])),
            num_iterations=int(found.num_iterations[name][i]),
            num_probes=found.num_probes,
        )
        for name, value in found.value.items()
    ]
    total = float(sum(row.value for row in layers))
    converged = all(row.status is not Status.NOT_CONVERGED for row in layers)
    nmls = Row(
        quantity="nmls",
        value=total,
        sample=sample,
        lower=_bound(sum(found.lower[name][i] for name in found.lower)),
        upper=_bound(sum(found.upper[name][i] for name in found.upper)),
        status=_status(total, converged),
        num_iterations=max(row.num_iterations for row in layers),
        num_probes=sum(row.num_probes for row in layers),
        forward_equivalents=float(found.forward_equivalents[i]),
        seconds=seconds,
    )
    return [*layers, nmls]


def _constant_row(layer: str) -> Row:
    status = Status.CONSTANT_INPUT
    return Row(quantity="layer_mls", layer=layer, value=float("nan"), sample=0, status=status)


def _status(value: float, converged: bool) -> Status:
    if not np.isfinite(value):
        return Status.NOT_FINITE
    return Status.OK if converged else Status.NOT_CONVERGED


def _bound(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
