"""Norm and dimensionality of large Jacobians: probes against all rows, error beside time.

A ViT-Ti with 1000 outputs at random initialisation, whose spectrum falls slowly, and the same after
some training, whose spectrum falls fast. Every method measures the same images with one thread; the
truth is the dense Jacobian in float64. Times are CPU seconds. The self-test and the search for the
head, once per network and the same for all methods, are outside the times.

Probes run until each image's stated standard error is 2 % of its value, for both quantities, and
until 2 % times the root of the number of images, which gives 2 % for the mean.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import oracles
import timm
import torch
from rich.table import Table
from torch import nn

from tasks.block import Block
from tasks.jacobian import dense_jacobian
from tasks.layer_rows import num_rows
from tasks.local_dimensionality import LocalDimensionality
from tasks.measurement import Row, Subject
from tasks.self_test import self_test

ARCHITECTURE = "vit_tiny_patch16_224"
IMAGE_SIZE = 96
NUM_OUTPUTS = 1000
NUM_IMAGES = 4
TRAINING_STEPS = 40
TARGET = 0.02

ALL_ROWS, HEAD_ROWS = "all rows", "rows through the head"
PER_IMAGE, OF_MEAN = "probes, 2 % per image", "probes, 2 % of the mean"
_Result = TypeVar("_Result")
_QUANTITIES = ("local_dimensionality", "jacobian_norm_squared")


def run() -> list[dict[str, Any]]:
    """Measure both networks with every method.

    Returns:
        One dictionary per network and method: seconds per image, ``speedup`` over all rows,
        probes and Lanczos steps (largest of the images), mean dimensionality, and for both
        quantities the largest stated relative error of an image, the stated relative error of the
        mean, and the observed relative errors (largest, and of the mean).
    """
    images = torch.randn(
        NUM_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)
    )
    model = _vit()
    rows = _compare("random", copy.deepcopy(model), images)
    return rows + _compare("trained", _trained(model), images)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for reading."""
    title = f"Jacobian: {ARCHITECTURE}, {IMAGE_SIZE} px, {NUM_OUTPUTS} outputs, {NUM_IMAGES} images"
    shown = Table("network", "method", title=title)
    columns = ("s / image", "speed-up", "probes", "steps", "D", "stated max", "stated mean",
               "error max", "error of mean")  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row["network"],
            row["method"],
            f"{row['seconds_per_image']:.2f}",
            f"{row['speedup']:.1f}",
            f"{row['probes']:.0f}",
            f"{row['steps']:.0f}",
            f"{row['local_dimensionality']:.2f}",
            f"{row['stated_max']:.1e}",
            f"{row['stated_mean']:.1e}",
            f"{row['max_error']:.1e}",
            f"{row['mean_error']:.1e}",
        )
    return shown


def _compare(name: str, model: nn.Module, images: torch.Tensor) -> list[dict[str, Any]]:
    subject = oracles.make_subject(model, images, batch_size=NUM_IMAGES)
    self_test(subject)
    num_rows(subject, subject.batch(range(NUM_IMAGES)))
    truth = _from_rows(copy.deepcopy(model).double(), images.double())
    methods: dict[str, Callable[[], list[Row]]] = {
        HEAD_ROWS: lambda: _measure(subject, LocalDimensionality(method="dense")),
        PER_IMAGE: lambda: _measure(subject, _probes(TARGET)),
        OF_MEAN: lambda: _measure(subject, _probes(TARGET * NUM_IMAGES**0.5)),
    }
    all_rows, values = _timed(lambda: _from_rows(model, images))
    found = [_row(name, ALL_ROWS, all_rows, all_rows, truth, values, [])]
    for label, call in methods.items():
        seconds, rows = _timed(call)
        values = {q: np.array([r.value for r in rows if r.quantity == q]) for q in _QUANTITIES}
        found.append(_row(name, label, seconds, all_rows, truth, values, rows))
    return found


def _row(
    network: str,
    method: str,
    seconds: float,
    all_rows: float,
    truth: dict[str, np.ndarray],
    values: dict[str, np.ndarray],
    rows: list[Row],
) -> dict[str, Any]:
    stated = np.zeros((len(_QUANTITIES), NUM_IMAGES))
    for k, quantity in enumerate(_QUANTITIES):
        for i, row in enumerate(r for r in rows if r.quantity == quantity):
            stated[k, i] = row.stderr or 0.0
    value = np.stack([values[q] for q in _QUANTITIES])
    exact = np.stack([truth[q] for q in _QUANTITIES])
    means = value.mean(1)
    return {
        "network": network,
        "method": method,
        "seconds_per_image": seconds / NUM_IMAGES,
        "speedup": all_rows / seconds,
        "probes": max((r.num_probes for r in rows), default=0),
        "steps": max((r.num_iterations for r in rows), default=0),
        "local_dimensionality": float(means[0]),
        "stated_max": float((stated / value).max()),
        "stated_mean": float((np.linalg.norm(stated, axis=1) / NUM_IMAGES / means).max()),
        "max_error": float(np.abs(value / exact - 1).max()),
        "mean_error": float(np.abs(means / exact.mean(1) - 1).max()),
    }


def _from_rows(model: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Both quantities from all N rows of all images at once: 220 MB each."""
    rows = dense_jacobian(model, images, "sigmoid").flatten(2)
    gram = rows @ rows.mT
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    ratio = trace.square() / gram.square().sum((1, 2))
    return dict(zip(_QUANTITIES, (ratio.numpy(), trace.numpy()), strict=True))


def _probes(target: float) -> LocalDimensionality:
    return LocalDimensionality(method="probes", target_relative_stderr=target)


def _measure(subject: Subject, measurement: LocalDimensionality) -> list[Row]:
    return measurement.measure(subject, Block(range(NUM_IMAGES)))


def _timed(call: Callable[[], _Result]) -> tuple[float, _Result]:
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def _vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(ARCHITECTURE, img_size=IMAGE_SIZE, num_classes=NUM_OUTPUTS)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model.eval()


def _trained(model: nn.Module) -> nn.Module:
    """After a few steps that tell random patterns apart: enough for a spectrum that falls."""
    random = torch.Generator().manual_seed(1)
    patterns = torch.randn(16, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(TRAINING_STEPS):
        labels = torch.randint(16, (16,), generator=random)
        noise = torch.randn(16, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random)
        logits = model(patterns[labels] + 0.5 * noise)
        targets = nn.functional.one_hot(labels, NUM_OUTPUTS).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
