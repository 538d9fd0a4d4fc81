"""What a finished training says of its checkpoint: final losses, accuracies and their gap."""

from __future__ import annotations

import math

import numpy as np

from tasks.measurement import Columns, Estimate

FINAL_QUANTITIES = (
    "train_loss",
    "test_loss",
    "train_accuracy",
    "test_accuracy",
    "generalization_gap",
)


def summarize_training(rows: Columns) -> list[Estimate]:
    """One exact estimate per final quantity: the rows without a step, over all images.

    They are values on the whole sets, not samples of a population, so they carry no error.
    """
    steps = np.asarray(rows["step"], dtype=np.float64)
    quantities = np.asarray(rows["quantity"])
    estimates = []
    for quantity in FINAL_QUANTITIES:
        (value,) = np.asarray(rows["value"])[np.isnan(steps) & (quantities == quantity)]
        estimates.append(
            Estimate(
                quantity=quantity,
                value=float(value),
                stderr=0.0,
                ci_low=math.nan,
                ci_high=math.nan,
                num_samples=0,
                num_rows=1,
                error_bound=0.0,
            )
        )
    return estimates
