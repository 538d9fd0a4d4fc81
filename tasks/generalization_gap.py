"""Training minus test accuracy of a checkpoint that somebody else trained.

Images of the training split are scored beside those of the manifest's split, with the same
evaluation transform and without augmentation. Whether they are the very images that the network
was trained on, nobody checks. Networks that a run trains have an exact gap over all their images
(tasks/training_results.py) and do not need this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from tasks.accuracy import image_scores, mean_share, score_rows
from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.measurement import (
    Batch,
    Columns,
    Estimate,
    Measurement,
    MeasurementError,
    Row,
    Subject,
)
from tasks.outline import Outline
from tasks.proportions import newcombe_interval
from tasks.sample_mean import sample_mean

_NAME = "generalization_gap"
_TRAIN = ("train_accuracy", "train_half_squared_error", "train_cross_entropy")
_TEST = ("test_accuracy", "test_half_squared_error", "test_cross_entropy")
_POINTS = 100  # the gap is in percentage points, accuracies are shares


class GeneralizationGap(Measurement):
    """Gap in percentage points with both accuracies (shares) and losses; there are no settings.

    Sample i is the i-th image of the training split's order together with the i-th of the
    manifest's split.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (
        _NAME, _TRAIN[0], _TEST[0], *_TRAIN[1:], *_TEST[1:],
    )  # fmt: skip
    needs_labels: ClassVar[bool] = True
    needs_training_images: ClassVar[bool] = True

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """Six rows per sample: accuracy, loss of Eq. 1 and cross-entropy of its two images.

        Raises:
            MeasurementError: If there are no training images, or the network gives NaN or infinity
                for an image.
        """
        if subject.training_batch is None:
            raise MeasurementError(
                f"{_NAME} needs images of the training split, found none with this checkpoint. "
                "Give the Subject a training_batch."
            )
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            try:
                train = _rows(subject, subject.training_batch, chunk, _TRAIN)
            except MeasurementError as error:
                raise MeasurementError(f"training images, {error}") from error
            test = _rows(subject, subject.batch, chunk, _TEST)
            rows += [
                row for pair in zip(train, test, strict=True) for image in pair for row in image
            ]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """The gap with the errors of both accuracies, and all six means.

        The two sets of images are independent, so the gap's ``stderr`` is the root of the sum of
        their squares. Intervals (95 %) are Newcombe's for the gap, Wilson's for the accuracies and
        Student's for the losses.
        """
        train, test = mean_share(rows, _TRAIN[0]), mean_share(rows, _TEST[0])
        losses = [sample_mean(rows, quantity) for quantity in (*_TRAIN[1:], *_TEST[1:])]
        return [_gap(train, test), train, test, *losses]

    def forward_equivalents(self, network: Outline) -> float:
        """One forward for each of the two images."""
        return 2.0


def _rows(
    subject: Subject,
    load: Callable[[Sequence[int]], Batch],
    chunk: range,
    names: tuple[str, ...],
) -> list[list[Row]]:
    """The rows of each image of a batch."""
    started = time.perf_counter()
    batch = load(chunk)
    scores = image_scores(subject, batch)
    seconds = (time.perf_counter() - started) / len(chunk)
    return [
        list(score_rows(scores, i, sample, names=names, seconds=seconds))
        for i, sample in enumerate(batch.samples)
    ]


def _gap(train: Estimate, test: Estimate) -> Estimate:
    low, high = newcombe_interval(
        train.value, test.value, count_first=train.num_samples, count_second=test.num_samples
    )
    return Estimate(
        quantity=_NAME,
        value=_POINTS * (train.value - test.value),
        stderr=_POINTS * math.hypot(train.stderr, test.stderr),
        ci_low=_POINTS * low,
        ci_high=_POINTS * high,
        num_samples=train.num_samples,
        num_rows=train.num_rows + test.num_rows,
        forward_equivalents=train.forward_equivalents + test.forward_equivalents,
    )
