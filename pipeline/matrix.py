"""The correlation matrix of a run: every pair of its series, as in the paper's Figure G.6.

One table with the columns of ``correlations``, a pure function of the summary. Each pair has
Pearson's r (with its interval) and Spearman's ρ (without: its replicates cost n² each), over all
checkpoints and within families. x is the series that comes first in the plot, y the later one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pydantic

from pipeline.correlate import CorrelationPair, correlation_frame, correlation_rows, paired_points
from tasks.correlation import MIN_FOR_R, Transform, transformed


class PairPlot(pydantic.BaseModel):
    """Which series the matrix holds: the ``[pair_plot]`` table of the manifest.

    Attributes:
        series: In this order. None: all that the manifest gives.
        transforms: Scale of a series, where it is not the default: ``"log"`` if all values are
            positive, ``"identity"`` if one is not.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    series: tuple[str, ...] | None = pydantic.Field(default=None, min_length=2)
    transforms: dict[str, Transform] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _names_each_series_once(self) -> PairPlot:
        if self.series is not None and len(set(self.series)) < len(self.series):
            raise ValueError(f"series names one twice: {list(self.series)!r}")
        return self


class SeriesValues(NamedTuple):
    """One series over the checkpoints, on its scale.

    ``values`` (n,) are those inside the scale, sorted. ``gaps`` says what became of the others:
    missing, infinite, or outside the scale.
    """

    series: str
    transform: Transform
    values: np.ndarray
    gaps: str

    @property
    def is_constant(self) -> bool:
        """Whether there are values, and only equal ones."""
        return self.values.size > 0 and bool(self.values[0] == self.values[-1])


def matrix_table(
    summary: pd.DataFrame, plot: PairPlot | None, *, seed: int, num_bootstrap: int = 2000
) -> pd.DataFrame:
    """Correlate all pairs of the plot's series.

    Args:
        summary: As in ``correlation_table``.
        plot: Its ``series`` must be named; the manifest's are. None: no pairs.
        seed: The manifest's seed.
        num_bootstrap: Replicates per interval of Pearson's r.

    Returns:
        One row per pair, group (``all``, ``within``) and method (``pearson``, ``spearman``).
    """
    rows = []
    for pair in matrix_pairs(summary, plot) if plot else ():
        points = paired_points(summary, pair)
        rows += correlation_rows(
            summary,
            pair,
            [("all", points), ("within", points)],
            seed=seed,
            num_bootstrap={"pearson": num_bootstrap, "spearman": 0},
        )
    return correlation_frame(rows)


def matrix_pairs(summary: pd.DataFrame, plot: PairPlot) -> list[CorrelationPair]:
    """All pairs with their scales: x comes before y in the plot's order."""
    scales: dict[str, Transform] = {s.series: s.transform for s in series_values(summary, plot)}
    return [
        CorrelationPair(
            x=x, y=y, transform_x=scales[x], transform_y=scales[y], methods=("pearson", "spearman")
        )
        for x, y in itertools.combinations(scales, 2)
    ]


def series_values(summary: pd.DataFrame, plot: PairPlot) -> list[SeriesValues]:
    """Scale, values and gaps of each series of the plot."""
    assert plot.series is not None, "the manifest names the series of its pair plot"
    found = []
    for series in plot.series:
        raw = summary.loc[summary["series"] == series, "value"].to_numpy(dtype=np.float64)
        finite = raw[np.isfinite(raw)]
        transform = plot.transforms.get(series) or ("log" if (finite > 0).all() else "identity")
        values, _ = transformed(finite, np.zeros_like(finite), transform)
        values = np.sort(values[np.isfinite(values)])
        gaps = [
            (int(np.isnan(raw).sum()), "missing"),
            (int(np.isinf(raw).sum()), "infinite"),
            (finite.size - values.size, f"outside the {transform} scale"),
        ]
        text = ", ".join(f"{count} {what}" for count, what in gaps if count)
        found.append(SeriesValues(series, transform, values, text))
    return found


def cell_reason(row: Mapping[Hashable, Any]) -> str:
    """Why a pair has no coefficient, in a word or two; empty if it has one."""
    if not math.isnan(row["r"]):
        return ""
    return f"needs {MIN_FOR_R} checkpoints" if row["n"] < MIN_FOR_R else "constant"


def unscaled(values: np.ndarray, transform: Transform) -> np.ndarray:
    """Values (n,) on their scale, back in their units."""
    return {"log": np.exp, "sqrt": np.square, "identity": np.asarray}[transform](values)
