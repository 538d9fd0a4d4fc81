"""Local volumetric ratios of the network and of every layer's map, with the ranks they rest on.

For image i with the singular values s_k of J = d f / d x (Eq. 7, 10):

    dV      = product of s_k over k = 1..r, r the numerical rank      units ([f] / [x])^r
    log_lvr = log mean_i dV_i                                         (Eq. 7)
    log_nvr = log sum_l mean_i dV_i^l, dV^l of J_l W_l through layer l alone   (Eq. 10)

``volume = "pseudo"`` is the paper's product of the positive eigenvalues, over the numerical rank;
``"full"`` is 0 where the rank is below N. ``log_volume_top3`` is what the paper's code plots: the
mean over images of half the sum of the logarithms of the three largest eigenvalues of J J^T (here
of at most r: its code takes the logarithm of rounding where the rank is below three).

All singular values are computed. Sampling the log-determinant (stochastic Lanczos quadrature) is
not offered: J J^T is singular in every network whose last layer is narrower than its outputs, its
spectrum spans four to nine decades, and the quadrature takes rounding for eigenvalues; on such
networks as many products as it needs give the exact rows.

The rank decides what a volume means. It is cut where singular values drown in the rounding of the
network's products, so it needs float64 where the spectrum reaches down there; rows say
``unclear_rank`` where there is no gap at the cut.

Shapes: B images, K singular values.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pydantic

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.layer_rows import IMAGE, memory_text, network_layers
from tasks.log_mean import log_mean, log_sum
from tasks.measurement import Columns, Estimate, Measurement, Row, Status, Subject
from tasks.outline import Outline
from tasks.sample_mean import rows_by_layer, sample_mean
from tasks.spectra import Spectra, numerical_rank, predicted_cost, spectra

Mode = Literal["pseudo", "full"]

_ALLOWANCE = 4  # widening of singular values in units of the rows' noise; chosen


class Volume(Measurement):
    """Settings of the local volumetric ratios.

    Attributes:
        volume: ``pseudo`` multiplies the singular values above rounding. ``full`` is 0 for an image
            whose Jacobian has a rank below the number of outputs.
        layers: Whether to measure every layer's map too. Without, ``log_nvr`` is not measured.
        memory_gib: Rows held at once, in GiB. Less memory means more passes.
    """

    metric: ClassVar[str] = "volume"
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (
        "log_lvr",
        "log_nvr",
        "mean_log_volume",
        "log_volume_top3",
        "jacobian_rank",
    )
    coverage_fields: ClassVar[frozenset[str]] = frozenset({"memory_gib"})

    volume: Mode = "pseudo"
    layers: bool = True
    memory_gib: float = pydantic.Field(default=2.0, gt=0)

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Logarithms of volumes and ranks per image, and per image and layer.

        ``log_volume`` carries the work and the time. Its ``lower`` and ``upper`` hold as long as
        the rank is right. A module on a constant input has ``layer_log_volume`` and ``layer_rank``
        rows at sample 0, NaN with status ``constant_input``.

        Raises:
            MeasurementError: If the network fails the self-test, gives NaN for an image, has no
                layer, or the rows of one layer and image take more than ``memory_gib``.
        """
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            found = spectra(subject, batch, layers=self.layers, memory_gib=self.memory_gib)
            volumes = {name: _volumes(found, name, self.volume) for name in found.singular_values}
            seconds = (time.perf_counter() - started) / len(chunk)
            for i, sample in enumerate(batch.samples):
                rows += _image_rows(volumes, i, sample, found, seconds)
            if self.layers and 0 in chunk:
                rows += _constant_rows(network_layers(subject)[1])
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Logarithms of means with errors by the delta method, and means of the rest.

        ``layer_log_volume`` is the logarithm of a layer's mean, so ``log_nvr`` is the logarithm of
        the sum of their exponentials. With ``pseudo``, estimates over images of different rank say
        ``rank_varies``.
        """
        varies = self._varies(rows, "jacobian_rank")
        estimates = [
            log_mean(rows, "log_volume", name="log_lvr"),
            replace(sample_mean(rows, "log_volume"), quantity="mean_log_volume"),
            sample_mean(rows, "log_volume_top3"),
            sample_mean(rows, "jacobian_rank"),
        ]
        estimates = [_marked(estimate, varies) for estimate in estimates]
        if not self.layers:
            return [*estimates, _not_measured("log_nvr")]
        some_vary = False
        ranks, volumes = (rows_by_layer(rows, q) for q in ("layer_rank", "layer_log_volume"))
        for layer, part in volumes.items():
            varies = self._varies(ranks[layer], "layer_rank")
            some_vary |= varies
            volume = log_mean(part, "layer_log_volume", name="layer_log_volume")
            for estimate in (volume, sample_mean(ranks[layer], "layer_rank")):
                estimates.append(_marked(replace(estimate, layer=layer), varies))
        return [*estimates, _marked(log_mean(rows, "log_nvr", name="log_nvr"), some_vary)]

    def forward_equivalents(self, network: Outline) -> float:
        """Predicted work per image."""
        return predicted_cost(network, layers=self.layers, memory_gib=self.memory_gib)

    def note(self, network: Outline) -> str:
        """How many rows, and what those of the largest map need."""
        sizes = [int(np.prod(network.data_config["input_size"]))]
        sizes += [layer.input_size for layer in network.layers] if self.layers else []
        where = f" through {len(sizes) - 1} layers" if self.layers else ""
        rows = network.jacobian_rows
        memory = memory_text(rows, max(sizes), self.memory_gib)
        return f"{rows} exact rows{where}, the largest take {memory}"

    def _varies(self, rows: Columns, quantity: str) -> bool:
        """Whether volumes of different dimension would be averaged."""
        chosen = np.asarray(rows["quantity"]) == quantity
        ranks = np.asarray(rows["value"])[chosen].astype(np.float64)
        return self.volume == "pseudo" and len(np.unique(ranks[np.isfinite(ranks)])) > 1


@dataclass(frozen=True, eq=False)
class _Volumes:
    """Of one map, per image: arrays (B,) for logarithms of volumes with their bounds, and ranks."""

    log_volume: np.ndarray
    top3: np.ndarray
    rank: np.ndarray
    clear: np.ndarray


def _volumes(found: Spectra, name: str, mode: Mode) -> _Volumes:
    """Logarithms are (B, 3): value, lower and upper end."""
    s, noise = found.singular_values[name], found.noise[name]
    rank, clear = numerical_rank(s, noise)
    order = np.arange(s.shape[1])
    error = _ALLOWANCE * noise * s[:, :1]  # Weyl: no singular value moves further
    kept = order < rank[:, None]
    with np.errstate(divide="ignore"):
        ends = np.stack([s, np.where(kept, s - error, s), s + error], axis=1)
        logs = np.where(kept[:, None], np.log(np.where(kept[:, None], ends, 1.0)), 0.0)
    volume, top3 = logs.sum(2), logs[:, :, :3].sum(2)
    top3[rank == 0] = -np.inf
    volume[rank == 0 if mode == "pseudo" else rank < found.num_outputs] = -np.inf
    overflow = np.isnan(s).any(1)
    volume[overflow] = top3[overflow] = np.nan
    return _Volumes(volume, top3, np.where(overflow, np.nan, rank), clear)


def _image_rows(
    volumes: dict[str, _Volumes], i: int, sample: int, found: Spectra, seconds: float
) -> list[Row]:
    """The rows of image i of a batch."""
    of = volumes[IMAGE]
    status = _status(of.log_volume[i, 0], bool(of.clear[i]))
    rows = [
        replace(
            _row("log_volume", of.log_volume[i], sample, status),
            num_iterations=found.num_rows,
            forward_equivalents=found.forward_equivalents,
            seconds=seconds,
        ),
        _row("log_volume_top3", of.top3[i], sample, status),
        _rank_row("jacobian_rank", of, i, sample, status),
    ]
    layers = [name for name in volumes if name != IMAGE]
    for name in layers:
        of = volumes[name]
        status = _status(of.log_volume[i, 0], bool(of.clear[i]))
        volume = _row("layer_log_volume", of.log_volume[i], sample, status)
        rank = _rank_row("layer_rank", of, i, sample, status)
        rows += [replace(volume, layer=name), replace(rank, layer=name)]
    if layers:
        logs = np.stack([volumes[name].log_volume[i] for name in layers])
        total = np.array([log_sum(column) for column in logs.T])
        clear = all(bool(volumes[name].clear[i]) for name in layers)
        rows.append(_row("log_nvr", total, sample, _status(total[0], clear)))
    return rows


def _row(quantity: str, ends: np.ndarray, sample: int, status: Status) -> Row:
    value, lower, upper = (float(x) for x in ends)
    known = not np.isnan(value)
    return Row(
        quantity=quantity,
        value=value,
        sample=sample,
        lower=lower if known else None,
        upper=upper if known else None,
        status=status,
    )


def _rank_row(quantity: str, of: _Volumes, i: int, sample: int, status: Status) -> Row:
    """A rank is exact where the cut is clear, and without bounds elsewhere."""
    value = float(of.rank[i])
    bound = value if status is Status.OK else None
    return Row(
        quantity=quantity, value=value, sample=sample, lower=bound, upper=bound, status=status
    )


def _constant_rows(layers: tuple[str, ...]) -> list[Row]:
    return [
        Row(quantity, float("nan"), 0, layer=layer, status=Status.CONSTANT_INPUT)
        for layer in layers
        for quantity in ("layer_log_volume", "layer_rank")
    ]


def _status(log_volume: float, clear: bool) -> Status:
    """A volume of 0 is a number; NaN is an overflow."""
    if np.isnan(log_volume):
        return Status.NOT_FINITE
    return Status.OK if clear else Status.UNCLEAR_RANK


def _marked(estimate: Estimate, varies: bool) -> Estimate:
    if varies and estimate.status is Status.OK:
        return replace(estimate, status=Status.RANK_VARIES)
    return estimate


def _not_measured(quantity: str) -> Estimate:
    nan = float("nan")
    return Estimate(quantity, nan, nan, nan, nan, 0, 0, status=Status.NOT_MEASURED)
