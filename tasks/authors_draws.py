"""How the paper's published code chooses weight draws (chinsengi/sharpdim 2bcbe24, src/pert.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.anova import Table

# Their recipe as settings of AdaptiveSharpness. 0.15 is the ratio of standard error to mean at
# which they drop a network; here it only sets the status.
AUTHORS: dict[str, Any] = {
    "group_size": 1,
    "min_draws": 50,
    "max_draws": 200,
    "max_samples": None,
    "target_relative_stderr": 0.15,
}


def authors_draws(table: Table, rho: float) -> np.ndarray:
    """Number of draws that the authors' code gives to each image.

    There, int(std / (10 rho)) ** 2 with the standard deviation of the image's first 50 losses,
    clipped to 50..200. An image's draws beyond that number take no part in their estimate.

    Args:
        table: Values of (image, draw) pairs in any order.
        rho: Noise scale, to turn values back into loss changes.

    Returns:
        (R,) the number for the image of each row.
    """
    _, images = np.unique(table.samples, return_inverse=True)
    first = table.draws < AUTHORS["min_draws"]
    count = np.maximum(np.bincount(images, first), 1)  # an incomplete run may lack an image's
    changes = np.where(first, table.values * rho**2, 0.0)
    centre = np.bincount(images, changes) / count
    variance = np.bincount(images, first * np.square(changes - centre[images])) / count
    wanted = np.trunc(np.sqrt(variance) / (10 * rho)) ** 2
    return np.clip(wanted, AUTHORS["min_draws"], AUTHORS["max_draws"])[images]
