"""Predicted cost of units, from FLOPs counted on the meta device and one rate per device class.

Predictions choose unit sizes and weight the progress bar; they never change a number. ``calibrate``
compares them with finished units, so that later plans of a run speak in this machine's seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from pipeline.specs import Spec
from tasks.outline import Outline

# Sustained float32 rates and the overhead of one image in a batched forward, order of magnitude:
# measured on one core of a 2-core x86 server (2026-11, small ViTs); GPU value is an estimate.
FLOPS_PER_SECOND = {"cpu": 2.5e10, "cuda": 1.0e13}
SECONDS_PER_IMAGE = {"cpu": 2.0e-4, "cuda": 1.0e-4}
BACKWARD_FORWARDS = 3.0  # a training step in forwards of its batch


def seconds_per_index(spec: Spec, device: str) -> float:
    """Predicted seconds for one index of a measurement, or for a whole training."""
    if spec.train is not None:
        settings = spec.train.settings
        forwards = settings.steps * settings.batch_size * BACKWARD_FORWARDS
    else:
        assert spec.entry is not None
        forwards = spec.entry.measurement.forward_equivalents(spec.network.num_outputs)
    return forwards * forward_seconds(spec.network, device)


def forward_seconds(network: Outline, device: str) -> float:
    """Predicted seconds of one image's no-grad forward."""
    return network.forward_flops / FLOPS_PER_SECOND[device] + SECONDS_PER_IMAGE[device]


def calibrate(measured: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Low, middle and high factor from (predicted, measured) seconds of finished units.

    Without finished units the factor is 1 with a range of 3 either way: predictions on a machine
    nobody has measured are that good.
    """
    ratios = sorted(m / p for p, m in measured if p > 0 and m > 0)
    if len(ratios) < 4:
        return 1 / 3, 1.0, 3.0
    low, *_, high = statistics.quantiles(ratios, n=10)
    return low, statistics.median(ratios), high
