"""Exact spectra through the head, and rows of all layers: time against what they replace.

A small ViT with 1000 outputs and random weights, one thread, CPU seconds. Two questions: what the
spectrum costs through the 192 directions that the head lets through, against all 1000 rows; and
what the rows of every layer add to those of the input, since one set of backward passes gives both.
The self-test and the search for the head, once per network, are outside the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import oracles
import timm
import torch
from rich.table import Table

from tasks.head import output_basis
from tasks.layer_graph import layer_graph
from tasks.layer_rows import IMAGE, num_rows
from tasks.measurement import Subject
from tasks.self_test import self_test
from tasks.spectra import spectra

ARCHITECTURE, IMAGE_SIZE, NUM_OUTPUTS = "vit_tiny_patch16_224", 96, 1000
NUM_IMAGES = 2
CHUNK = 16  # cotangents of one backward pass
NUM_COTANGENTS = 64  # for the rows of layers: every row costs the same
REPEATS = (
    3  # of rows; the minimum is kept: neighbours only ever add time, through the shared caches
)


def run() -> list[dict[str, Any]]:
    """Measure both pairs.

    Returns:
        One dictionary per way: its ``question``, ``rows``, ``seconds_per_image``, ``ratio`` (time
        of the question's first way over this one's) and ``error`` (largest difference of singular
        values from the first way's, relative to the largest; 0 for rows of layers).
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(ARCHITECTURE, img_size=IMAGE_SIZE, num_classes=NUM_OUTPUTS)
        images = torch.randn(NUM_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False
    subject = oracles.make_subject(model, images, batch_size=NUM_IMAGES)
    self_test(subject)
    num_rows(subject, subject.batch(range(NUM_IMAGES)))
    return _spectra(subject) + _layers(subject, images)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for reading."""
    title = f"Layers: {ARCHITECTURE}, {IMAGE_SIZE} px, {NUM_OUTPUTS} outputs, {NUM_IMAGES} images"
    shown = Table("question", "way", title=title)
    for column in ("rows", "s / image", "ratio", "difference"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row["question"],
            row["way"],
            str(row["rows"]),
            f"{row['seconds_per_image']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['error']:.1e}",
        )
    return shown


def _spectra(subject: Subject) -> list[dict[str, Any]]:
    """The spectrum of the images' Jacobians from all rows, then through the head."""
    batch = subject.batch(range(NUM_IMAGES))
    with mock.patch("tasks.layer_rows.subject_head", return_value=None):
        slow, every = _timed(lambda: spectra(subject, batch))
    fast, few = _timed(lambda: spectra(subject, batch))
    values = few.singular_values[IMAGE]
    reference = every.singular_values[IMAGE][:, : values.shape[1]]
    error = float(np.abs(values - reference).max() / reference.max())
    return [
        _row("spectrum", "all rows", every.num_rows, slow, slow, 0.0),
        _row("spectrum", "through the head", few.num_rows, fast, slow, error),
    ]


def _layers(subject: Subject, images: torch.Tensor) -> list[dict[str, Any]]:
    """Backward passes that return the rows of the input, and of the input and every layer."""
    graph = layer_graph(subject.model, images, subject.output)
    cotangents = output_basis(graph.slope, None)[:NUM_COTANGENTS]
    every = list(range(len(graph.layers)))

    def passes(inputs: list[int]) -> Callable[[], None]:
        def call() -> None:
            for chunk in cotangents.split(CHUNK):
                graph.pull(chunk, images=True, inputs=inputs)

        return call

    # Taken in turn, so that a busy machine slows both.
    ways = {"input alone": passes([]), "input and all layers": passes(every)}
    times = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, call in ways.items():
            times[way].append(_timed(call)[0])
    reference = min(times["input alone"])
    return [_row("rows", way, len(cotangents), min(times[way]), reference, 0.0) for way in ways]


def _row(
    question: str, way: str, rows: int, seconds: float, reference: float, error: float
) -> dict[str, Any]:
    return {
        "question": question,
        "way": way,
        "rows": rows,
        "seconds_per_image": seconds / NUM_IMAGES,
        "ratio": reference / seconds,
        "error": error,
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returned."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result
