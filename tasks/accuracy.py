"""Top-1 accuracy and losses of a checkpoint, image by image, from one forward each.

The loss is that of Eq. 1 of arXiv 2310.01770, L = mean over images of 1/2 ||f(x) - y||^2 with the
outputs f and the one-hot label y; the cross-entropy is that of the logits, -log softmax(z)_y.
The network runs in its own dtype, everything after its logits in float64.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.finite import require_finite
from tasks.jacobian import forward
from tasks.measurement import Batch, Columns, Estimate, Measurement, Row, Status, Subject
from tasks.outline import Outline
from tasks.proportions import wilson_interval
from tasks.sample_mean import sample_mean


class Accuracy(Measurement):
    """Accuracy (share between 0 and 1), loss of Eq. 1 and cross-entropy; there are no settings."""

    metric: ClassVar[str] = "accuracy"
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "cross_entropy")
    needs_labels: ClassVar[bool] = True

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Three rows per image; work and time are on its ``accuracy`` row.

        Raises:
            MeasurementError: If the network gives NaN or infinity for an image.
        """
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            scores = image_scores(subject, batch)
            seconds = (time.perf_counter() - started) / len(chunk)
            for i, sample in enumerate(batch.samples):
                rows += score_rows(scores, i, sample, names=self.quantities, seconds=seconds)
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Means over images: Wilson's interval (95 %) for the accuracy, Student's for the losses.

        An image whose loss overflows makes the estimate NaN, with status ``not_finite``.
        """
        accuracy, *losses = self.quantities
        return [mean_share(rows, accuracy), *(sample_mean(rows, name) for name in losses)]

    def forward_equivalents(self, network: Outline) -> float:
        """One forward per image."""
        return 1.0


class Scores(NamedTuple):
    """What one forward tells of each image; (B,) float64 each.

    Attributes:
        correct: 1 where the largest logit is the label's (the first of equal ones), else 0.
        loss: 1/2 ||f(x) - y||^2, infinite or NaN where it overflows.
        cross_entropy: -log softmax(z)_y in nats.
    """

    correct: np.ndarray
    loss: np.ndarray
    cross_entropy: np.ndarray


def image_scores(subject: Subject, batch: Batch) -> Scores:
    """Score the images of a batch with the weights that the network has now.

    Raises:
        MeasurementError: If an image or a logit is NaN or infinite.
    """
    with torch.no_grad():
        raw = forward(subject.model, batch.inputs)
        require_finite(subject.model, batch.inputs, raw, batch.samples)
        logits, targets = raw.double(), batch.targets.double()
        outputs = logits.sigmoid() if subject.output == "sigmoid" else logits
        labels = targets.argmax(1)
        correct = (logits.argmax(1) == labels).double()
        loss = (outputs - targets).square().sum(1) / 2
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return Scores(*(values.cpu().numpy() for values in (correct, loss, cross_entropy)))


def score_rows(
    scores: Scores, i: int, sample: int, *, names: tuple[str, ...], seconds: float
) -> Iterator[Row]:
    """Rows of one image, named in the order of ``Scores``; the first carries work and time."""
    for name, values in zip(names, scores, strict=True):
        finite = bool(np.isfinite(values[i]))
        first = name == names[0]
        yield Row(
            quantity=name,
            value=float(values[i]) if finite else float("nan"),
            sample=sample,
            status=Status.OK if finite else Status.NOT_FINITE,
            forward_equivalents=1.0 if first else 0.0,
            seconds=seconds if first else 0.0,
        )


def mean_share(rows: Columns, quantity: str) -> Estimate:
    """Mean of a quantity that is 0 or 1 for each image, with Wilson's interval (95 %)."""
    mean = sample_mean(rows, quantity)
    low, high = wilson_interval(mean.value, mean.num_samples)
    return replace(mean, ci_low=low, ci_high=high)
