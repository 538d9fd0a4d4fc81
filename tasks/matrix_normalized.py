"""Matrix-normalised sharpness: sum over layers of ||W_l||_2 S_l^(1/2) (right side of Eq. 35).

S_l = mean_i || d f / d W_l ||_F^2 is the layer's part of the sharpness of Eq. 3, ||W_l||_2 the
spectral norm of the layer as an operator on its input, enclosed for convolutions. Invariant to
rescaling layers of a ReLU network against each other, unlike sharpness.
"""

from __future__ import annotations

import math

import numpy as np

from tasks.layers import Layer
from tasks.linearised import linearised
from tasks.measurement import Columns, Estimate, Row, Status
from tasks.operator_norm import OperatorNorm, operator_norm
from tasks.plain_layers import is_plain
from tasks.sample_mean import rows_by_layer

LAYER_SHARPNESS = "layer_sharpness"
LAYER_NORM = "layer_norm"


def layer_operator_norm(layer: Layer) -> OperatorNorm | None:
    """Enclosure of a layer's spectral norm; None if it changes its weight in its forward."""
    if not is_plain(layer.module):
        return None
    height, width = layer.input_shape[-2:] if len(layer.input_shape) > 2 else (1, 1)
    return operator_norm(layer.module, (height, width), name=layer.name)


def norm_row(layer: Layer) -> Row:
    """Row of a layer's spectral norm, the middle of its enclosure; at sample 0."""
    norm = layer_operator_norm(layer)
    if norm is None:
        return Row(LAYER_NORM, math.nan, sample=0, layer=layer.name, status=Status.OWN_WEIGHT)
    middle = (norm.lower + norm.upper) / 2
    return Row(LAYER_NORM, middle, sample=0, layer=layer.name, lower=norm.lower, upper=norm.upper)


def matrix_normalized(rows: Columns) -> Estimate:
    """Estimate from the rows ``layer_sharpness`` and ``layer_norm`` of a checkpoint.

    The standard error comes from the images, the error bound from the enclosures of the norms. NaN
    with status ``own_weight`` if a layer has no norm or no sharpness of its own.
    """
    quantity = "matrix_normalized_sharpness"
    norms, layers = rows_by_layer(rows, LAYER_NORM), rows_by_layer(rows, LAYER_SHARPNESS)
    if not layers or norms.keys() != layers.keys():
        return linearised(quantity, math.nan, np.zeros(0), status=Status.OWN_WEIGHT)
    values = np.stack([part["value"].astype(np.float64) for part in layers.values()])
    lower, upper = (
        np.array([norms[name][end].astype(np.float64)[0] for name in layers])
        for end in ("lower", "upper")
    )
    roots = np.sqrt(values.mean(1))
    middle = (lower + upper) / 2
    slopes = np.divide(middle, 2 * roots, out=np.zeros_like(roots), where=roots > 0)
    missing = bool(np.isnan(middle).any())
    return linearised(
        quantity,
        float(middle @ roots),
        slopes @ (values - values.mean(1, keepdims=True)),
        error_bound=float((upper - lower) @ roots / 2),
        num_rows=values.size + len(norms),
        num_probes=int(sum(part["num_probes"].sum() for part in layers.values())),
        status=Status.OWN_WEIGHT if missing else Status.OK,
    )
