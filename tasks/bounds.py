"""The inequalities between flatness and compression, both sides measured on the same images.

Every check is a line of the ``bounds`` table: left side, right side, whether it holds, whether it
is a theorem and its conditions are met (``tasks.inequalities``). They are evaluated on stored terms
per image and layer (``tasks.bound_terms``), exact up to rounding: no side is sampled, and norms of
convolutions are upper ends of enclosures.

``mls_bound`` and ``nmls_bound`` are the right sides of Eq. 11 and 12 in the form of the setting
``kind``, ``dead_inputs`` the pairs of layer and image whose input is zero, where the paper's right
sides are not defined.
"""

from __future__ import annotations

import time
from typing import ClassVar, Literal

import numpy as np
import pydantic
import torch
from torch import nn

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.bound_forms import Network
from tasks.bound_terms import WHOLE, Terms, bound_terms
from tasks.inequalities import evaluate, mls_bound, nmls_bound
from tasks.layer_rows import GRAPH_COST, ROW_COST, memory_text, network_layers, num_passes
from tasks.layers import Layer
from tasks.linearised import linearised
from tasks.matrix_normalized import layer_operator_norm
from tasks.measurement import Check, Columns, Estimate, Measurement, Row, Status, Subject
from tasks.operator_norm import authors_weight_norm
from tasks.outline import Outline
from tasks.parameter_norms import check_coverage
from tasks.plain_layers import is_plain

_SETS_OF_ROWS = 3.4  # path rows, parameter gradients, rows of the first layer, the skips' share
# What comparisons allow for: rounding of sums of float64 and of float32 products; chosen.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}

Kind = Literal["untied", "printed", "authors", "direct", "per_position", "gram"]


class Bounds(Measurement):
    """Settings of the checks.

    Attributes:
        kind: Form of the right sides that the series ``mls_bound`` and ``nmls_bound`` show. All
            forms are evaluated anyway.
        memory_gib: Rows of Jacobians held at once, in GiB. Less memory means more passes.
    """

    metric: ClassVar[str] = "bounds"
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = ("mls_bound", "nmls_bound", "dead_inputs")
    coverage_fields: ClassVar[frozenset[str]] = frozenset({"kind", "memory_gib"})

    kind: Kind = "untied"
    memory_gib: float = pydantic.Field(default=2.0, gt=0)

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """The terms per image, and per image and layer; norms of layers at sample 0.

        Raises:
            MeasurementError: If a parameter's gradient is not covered, the network fails the
                self-test, gives NaN for an image or has no layer, or the rows of one layer and
                image take more than ``memory_gib``.
        """
        check_coverage(subject)
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            terms = bound_terms(subject, batch, memory_gib=self.memory_gib)
            seconds = (time.perf_counter() - started) / len(chunk)
            for i, sample in enumerate(batch.samples):
                rows += _image_rows(terms, i, sample, seconds)
            if 0 in chunk:
                rows += _weight_rows(network_layers(subject)[0])
                rows += [
                    Row("num_outputs", float(batch.targets.shape[1]), sample=0),
                    Row("rounding", _ROUNDING[batch.inputs.dtype], sample=0),
                ]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Right sides of Eq. 11 and 12 with errors by linearisation, and the dead inputs."""
        network = network_of(rows)
        own_weight = np.isnan(network.norm).any() or np.isnan(network.weight).all(1).any()
        chosen = np.asarray(rows["quantity"]) == "weight_gradient"
        work = np.asarray(rows["forward_equivalents"])[chosen].astype(np.float64)
        met = {c.bound: c.conditions_met for c in evaluate(network) if c.kind == self.kind}
        estimates = []
        for quantity, side, bound in (
            ("mls_bound", mls_bound, "11"), ("nmls_bound", nmls_bound, "12"),
        ):  # fmt: skip
            value, influence = side(network, self.kind)
            status = Status.OK if met[bound] else Status.CONDITIONS_UNMET
            status = Status.OWN_WEIGHT if np.isnan(value) and own_weight else status
            estimates.append(
                linearised(quantity, value, influence, status=status, num_rows=len(chosen))
            )
        dead = float((network.layer_length == 0).sum())
        count = len(network.sigma)
        estimates.append(
            Estimate(
                "dead_inputs", dead, np.nan, np.nan, np.nan, count, network.layer_length.size,
                error_bound=0.0, forward_equivalents=float(work.sum()),
            )
        )  # fmt: skip
        return estimates

    def checks(self, rows: Columns) -> list[Check]:
        """Every inequality in every form."""
        return evaluate(network_of(rows))

    def forward_equivalents(self, network: Outline) -> float:
        """Predicted work per image."""
        rows, sizes = network.jacobian_rows, [layer.input_size for layer in network.layers]
        passes = num_passes(sizes, rows, self.memory_gib)
        return GRAPH_COST * 3 + ROW_COST * _SETS_OF_ROWS * rows * passes

    def note(self, network: Outline) -> str:
        """How many rows, and what those of the largest layer need."""
        rows = network.jacobian_rows
        largest = max((layer.input_size for layer in network.layers), default=0)
        return (
            f"3 sets of {rows} exact rows through {len(network.layers)} layers, "
            f"the largest take {memory_text(rows, largest, self.memory_gib)}"
        )


def network_of(rows: Columns) -> Network:
    """The terms of a checkpoint from its rows, in any order of the images."""
    found: dict[tuple[str, str], list[float]] = {}
    samples: dict[tuple[str, str], list[int]] = {}
    order = np.argsort(np.asarray(rows["sample"]).astype(np.int64), kind="stable")
    names = ("quantity", "layer", "value", "sample")
    columns = (np.asarray(rows[name])[order].tolist() for name in names)
    for quantity, layer, value, sample in zip(*columns, strict=True):
        name = layer if isinstance(layer, str) else WHOLE
        found.setdefault((quantity, name), []).append(value)
        samples.setdefault((quantity, name), []).append(sample)
    terms = {key: np.array(values, dtype=np.float64) for key, values in found.items()}
    layers = tuple(name for quantity, name in terms if quantity == "path_sigma" and name != WHOLE)
    count = len(terms["path_sigma", WHOLE])

    def whole(quantity: str) -> np.ndarray:
        return terms.get((quantity, WHOLE), np.full(count, np.nan))

    def by_layer(quantity: str) -> np.ndarray:
        missing = np.full(count, np.nan)
        return np.stack([terms.get((quantity, name), missing) for name in layers])

    def of_weights(quantity: str) -> np.ndarray:
        return np.array([terms.get((quantity, name), np.full(1, np.nan))[0] for name in layers])

    def skip(name: str) -> np.ndarray:
        """Of every image; where none saw a skip connection, J is 0 and K the layer's own."""
        key = "skip_sigma", name
        seen = dict(zip(samples[key], terms[key].tolist(), strict=True))
        alone = zip(samples["path_sigma", name], terms["path_sigma", name].tolist(), strict=True)
        return np.array([seen.get(sample, sigma) for sample, sigma in alone])

    frobenius = by_layer("path_frobenius")
    rounding = float(terms["rounding", WHOLE][0])
    # A path around the first layer adds to the left sides what no right side allows for.
    same = np.abs(frobenius[0] - whole("path_frobenius")) <= rounding * frobenius[0]
    return Network(
        num_outputs=int(terms["num_outputs", WHOLE][0]),
        rounding=rounding,
        layers=layers,
        positions=of_weights("positions").astype(np.int64),
        norm=of_weights("operator_norm"),
        authors_norm=of_weights("authors_norm"),
        sigma=whole("path_sigma"),
        frobenius=whole("path_frobenius"),
        log_volume=whole("path_log_volume"),
        rank=whole("path_rank"),
        length=whole("input_norm"),
        total=whole("weight_gradient"),
        layer_sigma=by_layer("path_sigma"),
        layer_log_volume=by_layer("path_log_volume"),
        layer_rank=by_layer("path_rank"),
        layer_length=by_layer("input_norm"),
        weight=by_layer("weight_gradient"),
        output=by_layer("output_gradient"),
        position=by_layer("position_gradient"),
        least_position=by_layer("least_position"),
        least_gram=by_layer("least_gram"),
        skip={name: skip(name) for quantity, name in terms if quantity == "skip_sigma"},
        reads_image=("input_invariant", WHOLE) in terms and bool(same.all()),
        invariant=whole("input_invariant"),
        adaptive=whole("first_adaptive"),
        adaptive_untied=whole("first_adaptive_untied"),
        num_terms=float(whole("first_terms")[0]),
    )


def _image_rows(terms: Terms, i: int, sample: int, seconds: float) -> list[Row]:
    """The terms of image i of a batch; work and time are on the gradient of all parameters."""
    rows = []
    for quantity, by_layer in terms.values.items():
        for name, values in by_layer.items():
            carries = quantity == "weight_gradient" and name == WHOLE
            value = float(values[i])
            rows.append(
                Row(
                    quantity=quantity,
                    value=value,
                    sample=sample,
                    layer=None if name == WHOLE else name,
                    status=Status.NOT_FINITE if np.isnan(value) else Status.OK,
                    forward_equivalents=terms.forward_equivalents if carries else 0.0,
                    seconds=seconds if carries else 0.0,
                )
            )
    return rows


def _weight_rows(layers: tuple[Layer, ...]) -> list[Row]:
    """Norms and numbers of positions of layers, at sample 0."""
    convolutional = any(isinstance(layer.module, nn.Conv2d) for layer in layers)
    rows = []
    for layer in layers:
        rows.append(Row("positions", float(layer.positions), sample=0, layer=layer.name))
        norm = layer_operator_norm(layer)
        if norm is None or not is_plain(layer.module):
            continue
        rows.append(
            Row(
                "operator_norm", norm.upper, sample=0, layer=layer.name,
                lower=norm.lower, upper=norm.upper,
            )
        )  # fmt: skip
        size = layer.input_shape[-2:] if isinstance(layer.module, nn.Conv2d) else None
        authors = authors_weight_norm(
            layer.module,
            None if size is None else (size[0], size[1]),
            linear="frobenius" if convolutional else "spectral",
            name=layer.name,
        )
        rows.append(Row("authors_norm", authors, sample=0, layer=layer.name))
    return rows
