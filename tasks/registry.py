"""The measurements by name. A new measurement is one file and one line here."""

from __future__ import annotations

from tasks.accuracy import Accuracy
from tasks.adaptive_limit import AdaptiveSharpnessLimit
from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.bounds import Bounds
from tasks.generalization_gap import GeneralizationGap
from tasks.hessian_trace import HessianTrace
from tasks.input_invariant_mls import InputInvariantMls
from tasks.layer_sensitivity import Nmls
from tasks.local_dimensionality import LocalDimensionality
from tasks.measurement import Measurement
from tasks.relative_flatness import RelativeFlatness
from tasks.sensitivity import NormalizedMls
from tasks.sharpness import Sharpness
from tasks.volume import Volume

METRICS: dict[str, type[Measurement]] = {
    measurement.metric: measurement
    for measurement in (
        NormalizedMls,
        Nmls,
        Volume,
        AdaptiveSharpness,
        AdaptiveSharpnessLimit,
        HessianTrace,
        Accuracy,
        GeneralizationGap,
        Sharpness,
        RelativeFlatness,
        LocalDimensionality,
        InputInvariantMls,
        Bounds,
    )
}
