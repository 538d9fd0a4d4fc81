"""Squared error of the outputs, |f(x_i) - y_i|^2: twice the summand of the loss of Eq. 1."""

from __future__ import annotations

import numpy as np
import torch

from tasks.jacobian import forward
from tasks.measurement import Batch, Subject


def squared_errors(subject: Subject, batch: Batch) -> np.ndarray:
    """Squared error of each image under the weights that the network has now.

    The network runs in its own dtype; sigmoid, difference and sum are float64, because the
    measurements that use this take small differences of it.

    Returns:
        (B,) float64, NaN for an image with a logit that is not finite: the sigmoid of an
        overflow is a plausible number.
    """
    errors: list[np.ndarray] = []
    size = subject.batch_size
    with torch.no_grad():
        for inputs, targets in zip(
            batch.inputs.split(size), batch.targets.split(size), strict=True
        ):
            logits = forward(subject.model, inputs).double()
            outputs = logits.sigmoid() if subject.output == "sigmoid" else logits
            error = (outputs - targets.double()).square().sum(1)
            error[~logits.isfinite().all(1)] = float("nan")
            errors.append(error.cpu().numpy())
    return np.concatenate(errors)
