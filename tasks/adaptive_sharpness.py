"""Elementwise-adaptive sharpness: mean loss change under multiplicative weight noise (Eq. 46).

For image i and a draw delta ~ N(0, rho**2 diag(theta**2)) over all parameters,

    value = (|f(x_i; theta + delta) - y_i|^2 - |f(x_i; theta) - y_i|^2) / rho**2,

whose mean is 2 / rho**2 times the average-case sharpness of the loss of Eq. 1 (Eq. 38; the summed
squared error is twice that loss, so the factor 2 is in it) and tends to sum_k H_kk theta_k**2 as
rho -> 0 (Eq. 40). What is reported is the value at the stated finite rho. It may be negative away
from interpolation; the mean squared error is reported beside it to say how far that is. The
Gauss-Newton form of Eq. 41 is another quantity and not computed here.

``antithetic`` averages the changes under +delta and -delta, which removes all odd orders in delta
and with them most of the variance. ``one_sided`` does not. ``authors`` is the recipe of the
paper's published code: one-sided, every image by itself with 50 draws of its own, up to 200 where
the losses of the image spread (``authors_draws``).

Images share a draw in groups of ``group_size``. Draw r of group g comes from the key
(seed, "adaptive_sharpness", g, r), so it can be recreated and networks of one shape share it.
When to stop is the subject of ``tasks.grouped_stages``.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pydantic

from tasks.anova import Table, grouped_mean
from tasks.authors_draws import AUTHORS, authors_draws
from tasks.block import Block
from tasks.grouped_stages import (
    COVERAGE_FIELDS,
    check_draws,
    grouped_estimate,
    grouped_stages,
    grouped_status,
    sample_groups,
    select,
    suffices,
)
from tasks.measurement import (
    Batch,
    Columns,
    Estimate,
    Measurement,
    MeasurementError,
    Row,
    Status,
    Subject,
)
from tasks.outline import Outline
from tasks.perturbation import PerturbableWeights, perturbable
from tasks.random import generator
from tasks.sample_mean import sample_mean
from tasks.squared_error import squared_errors

_NAME = "adaptive_sharpness"
_ERROR_NAME = "squared_error"


class AdaptiveSharpness(Measurement):
    """Settings of the Monte-Carlo estimate of elementwise-adaptive sharpness.

    Attributes:
        method: How the loss change is sampled. ``authors`` fixes every setting but ``rho``.
        rho: Noise scale relative to each weight. Part of the quantity, not of its accuracy.
        group_size: Images that share a draw. Larger saves noise generation, smaller gives more
            independent groups to estimate the error from.
        min_draws: Draws per group to start with. Two are needed to tell draws from images.
        max_draws: Draws per group to end with at the latest.
        max_samples: Images to grow to before draws are added; None keeps the run's ``samples``.
        target_relative_stderr: Standard error over absolute value at which to stop.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (_NAME, _ERROR_NAME)
    needs_labels: ClassVar[bool] = True
    coverage_fields: ClassVar[frozenset[str]] = COVERAGE_FIELDS

    method: Literal["antithetic", "one_sided", "authors"] = "antithetic"
    rho: float = pydantic.Field(default=0.1, gt=0)
    group_size: int = pydantic.Field(default=8, ge=1)
    min_draws: int = pydantic.Field(default=2, ge=1)
    max_draws: int = pydantic.Field(default=64, ge=1)
    max_samples: int | None = pydantic.Field(default=None, ge=1)
    target_relative_stderr: float = pydantic.Field(default=0.05, gt=0)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_authors(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("method") != "authors":
            return data
        for name, value in AUTHORS.items():
            if data.get(name, value) != value:
                raise ValueError(
                    f"method = 'authors' means {name} = {value!r}, found {data[name]!r}. "
                    f"Remove {name}, or use method = 'one_sided' and set everything freely."
                )
        return {**AUTHORS, **data}

    @pydantic.model_validator(mode="after")
    def _check_draws(self) -> Self:
        check_draws(self)
        return self

    @property
    def alignment(self) -> int:
        """Groups stay whole, so that a group's images always share one batch."""
        return self.group_size

    def stages(self, num_samples: int, available: int) -> list[Block]:
        """Double the samples up to ``max_samples``, then the draws up to ``max_draws``.

        Raises:
            ValueError: If ``max_samples`` is below ``num_samples``.
        """
        return grouped_stages(self, num_samples, available)

    def finished(self, rows: Columns) -> bool:
        """Whether the target is reached, or further stages could not bring it nearer."""
        table = select(rows, _NAME)
        if self.method == "authors" and np.isfinite(table.values).all():
            return int(authors_draws(table, self.rho).max()) <= int(table.draws.max()) + 1
        return suffices(self, table)

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Measure draws on samples, group by group.

        Returns:
            A row for each image and draw, with the loss changes (of the summed squared error) that
            the value is made of, and with draw 0 a ``squared_error`` row for each image. A loss
            that overflows under noise gives a row with value NaN and status ``NOT_FINITE``.

        Raises:
            MeasurementError: If the unperturbed network gives NaN or infinity for an image.
        """
        rows: list[Row] = []
        with perturbable(subject.model) as weights:
            for group, members in sample_groups(block.samples, self.group_size):
                started = time.perf_counter()
                batch = subject.batch(members)
                base = _base_errors(subject, weights, batch)
                seconds = (time.perf_counter() - started) / len(members)
                for draw in block.draws:
                    rows += self._draw(subject, weights, batch, base, group=group, draw=draw)
                if 0 in block.draws:
                    rows += [
                        Row(_ERROR_NAME, e, sample=i, forward_equivalents=1.0, seconds=seconds)
                        for i, e in zip(members, base.tolist(), strict=True)
                    ]
        return rows

    def _draw(
        self, subject: Subject, weights: PerturbableWeights, batch: Batch, base: np.ndarray,
        *, group: int, draw: int,
    ) -> list[Row]:  # fmt: skip
        """The rows of one weight draw on one group of images."""
        started = time.perf_counter()
        weights.draw(generator(subject.seed, _NAME, group, draw, device=weights.noise.device))
        weights.perturb(self.rho)
        plus = minus = squared_errors(subject, batch) - base
        if self.method == "antithetic":
            weights.perturb(-self.rho)
            minus = squared_errors(subject, batch) - base
        seconds = (time.perf_counter() - started) / len(batch.samples)
        values = (plus + minus) / (2 * self.rho**2)
        finite = np.isfinite(values)
        return [
            Row(
                quantity=_NAME,
                value=float(values[i]),
                sample=sample,
                draw=draw,
                group=group,
                loss_change_plus=float(plus[i]),
                loss_change_minus=float(minus[i]) if self._num_signs == 2 else None,
                status=Status.OK if finite[i] else Status.NOT_FINITE,
                num_probes=1,
                forward_equivalents=float(self._num_signs),
                seconds=seconds,
            )
            for i, sample in enumerate(batch.samples)
        ]

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Reduce to the mean over images and draws, and the mean squared error.

        ``stderr`` contains the spread of images and draws, ``stderr_draws`` that of draws alone.
        """
        table = select(rows, _NAME)
        if self.method == "authors" and np.isfinite(table.values).all():
            kept = table.draws < authors_draws(table, self.rho)
            table = Table(*(column[kept] for column in table))
        estimates: list[Estimate] = []
        if len(table.values):
            mean = grouped_mean(table)
            estimates.append(
                grouped_estimate(
                    _NAME,
                    mean,
                    num_rows=len(table.values),
                    forward_equivalents=float(self._num_signs * len(table.values)),
                    status=grouped_status(self, mean),
                )
            )
        if (np.asarray(rows["quantity"]) == _ERROR_NAME).any():  # not where draw 0 is missing
            estimates.append(sample_mean(rows, _ERROR_NAME))
        return estimates

    def forward_equivalents(self, network: Outline) -> float:
        """Forwards per index, with the unperturbed one shared by the draws of an image."""
        return self._num_signs + 1 / self.min_draws

    @property
    def _num_signs(self) -> int:
        return 2 if self.method == "antithetic" else 1


def _base_errors(subject: Subject, weights: PerturbableWeights, batch: Batch) -> np.ndarray:
    # Other draws of the same images usually follow in the same process.
    key = (_ERROR_NAME, batch.samples)
    if key not in subject.cache:
        weights.restore()
        errors = squared_errors(subject, batch)
        if not np.isfinite(errors).all():
            sample = batch.samples[int(np.argmin(np.isfinite(errors)))]
            raise MeasurementError(
                f"expected finite outputs, found NaN or infinity for sample {sample}. "
                "Check the weights and the preprocessing of this checkpoint."
            )
        subject.cache[key] = errors
    return subject.cache[key]
