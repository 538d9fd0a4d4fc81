"""Maximum local sensitivity: our Lanczos against the published code's search, error beside time.

Every method measures the same test images with one thread; the truth is the dense Jacobian in
float64. Times are CPU seconds of the process, which are the wall time of one thread on an idle
machine. The published recipe runs one image at a time, as its script does. The self-test, once per
network and the same for all methods, is outside the times.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import torch
from rich.table import Table
from torch import nn

from tasks.block import Block
from tasks.measurement import Row, Subject
from tasks.self_test import self_test
from tasks.sensitivity import NormalizedMls

from . import networks

NUM_IMAGES = 16
BATCH_SIZE = 16
REPEATS = 2  # the minimum is kept: neighbours only ever add time, through the shared caches


def run(checkpoints: Sequence[Path], dataset: str) -> list[dict[str, Any]]:
    """Measure every network with every method.

    Args:
        checkpoints: Checkpoint folders.
        dataset: Where the images come from.

    Returns:
        One dictionary per network and method: seconds per image, ``speedup`` over the published
        recipe, ``forwards`` (seconds in units of one no-grad forward of the same batch),
        ``forward_equivalents`` (the same by counting products, median over images), observed
        relative errors of sigma_1 and the certified relative width (NaN without one).
    """
    found = [networks.load(path, dataset, num_images=NUM_IMAGES) for path in checkpoints]
    return [row for n in found for row in _compare(n.name, n.model, n.images)]


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for reading."""
    title = f"Sensitivity: {NUM_IMAGES} images, batch {BATCH_SIZE}, one thread"
    shown = Table("network", "method", title=title)
    for column in ("ms / image", "speed-up", "forwards", "counted", "error median", "max", "width",
                   "steps"):  # fmt: skip
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row["network"],
            row["method"],
            f"{1e3 * row['seconds_per_image']:.2f}",
            f"{row['speedup']:.1f}",
            f"{row['forwards']:.1f}",
            f"{row['forward_equivalents']:.1f}",
            f"{row['median_error']:.1e}",
            f"{row['max_error']:.1e}",
            f"{row['certified_width']:.1e}",
            f"{row['steps']:.0f}",
        )
    return shown


def _compare(name: str, model: nn.Module, images: torch.Tensor) -> list[dict[str, Any]]:
    batched = oracles.make_subject(model, images, batch_size=BATCH_SIZE)
    single = oracles.make_subject(model, images, batch_size=1)
    for subject in (batched, single):
        self_test(subject)
    referee = oracles.make_subject(copy.deepcopy(model).double(), images)
    truth = _values(_measure(referee, NormalizedMls(method="dense")))

    methods = {
        "authors, one by one": (single, NormalizedMls(method="authors")),
        "authors, batched": (batched, NormalizedMls(method="authors")),
        "Lanczos 1e-3 certified": (batched, NormalizedMls()),
        "Lanczos 1e-3, one by one": (single, NormalizedMls()),
        "Lanczos 2e-2 certified": (batched, NormalizedMls(tolerance=0.02)),
        "Lanczos, 1 % observed": (batched, _fewest_steps(batched, truth, within=0.01)),
        "power 1e-3": (batched, NormalizedMls(method="power", max_iterations=500)),
        "dense": (batched, NormalizedMls(method="dense")),
    }
    calls: dict[str, Callable[[], Any]] = {
        label: lambda s=subject, m=measurement: _measure(s, m)
        for label, (subject, measurement) in methods.items()
    }
    calls["forward"] = lambda: _forward(model, images)
    seconds = _interleaved_minimum(calls)
    rows = []
    for label, (subject, measurement) in methods.items():
        both = measurement.measure(subject, Block(range(NUM_IMAGES)))
        found = _of("mls", both)
        errors = np.abs(_values(found) / truth - 1)
        widths = [
            float("nan") if row.upper is None or row.lower is None else row.upper - row.lower
            for row in found
        ]
        rows.append(
            {
                "network": name,
                "method": label,
                "seconds_per_image": seconds[label] / len(images),
                "speedup": seconds["authors, one by one"] / seconds[label],
                "forwards": seconds[label] / seconds["forward"],
                "forward_equivalents": float(
                    np.median([row.forward_equivalents for row in _of("normalized_mls", both)])
                ),
                "median_error": float(np.median(errors)),
                "max_error": float(errors.max()),
                "certified_width": float(np.max(np.array(widths) / truth)),
                "steps": float(np.median([row.num_iterations for row in found])),
            }
        )
    return rows


def _fewest_steps(subject: Subject, truth: np.ndarray, *, within: float) -> NormalizedMls:
    """The smallest iteration limit at which every image is within the observed error."""
    for steps in range(1, 65):
        settings = NormalizedMls(max_iterations=steps)
        if (np.abs(_values(_measure(subject, settings)) / truth - 1) <= within).all():
            return settings
    raise RuntimeError(f"64 steps do not bring every image within {within}")


def _measure(subject: Subject, measurement: NormalizedMls) -> list[Row]:
    return _of("mls", measurement.measure(subject, Block(range(NUM_IMAGES))))


def _of(quantity: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.quantity == quantity]


def _values(rows: list[Row]) -> np.ndarray:
    return np.array([row.value for row in rows])


def _forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        for batch in images.split(BATCH_SIZE):
            model(batch)


def _interleaved_minimum(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """CPU seconds of each call: the least of rounds in which all take turns, after a warm-up."""
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(REPEATS + 1):
        for label, call in calls.items():
            for _ in range(20 if label == "forward" else 1):  # short: more chances to be alone
                started = time.process_time()
                call()
                elapsed = time.process_time() - started
                if repeat:
                    best[label] = min(best[label], elapsed)
    return best
