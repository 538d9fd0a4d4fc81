"""Predicted cost of units, from FLOPs counted on the meta device and one rate per device class.

Predictions choose unit sizes and weight the progress bar; they never change a number. What they
are worth on the machines of a run is the subject of pipeline/calibration.py.
"""

from __future__ import annotations

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
        forwards = spec.entry.measurement.forward_equivalents(spec.network)
    return forwards * forward_seconds(spec.network, device)


def forward_seconds(network: Outline, device: str) -> float:
    """Predicted seconds of one image's no-grad forward."""
    return network.forward_flops / FLOPS_PER_SECOND[device] + SECONDS_PER_IMAGE[device]
