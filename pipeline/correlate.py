"""Correlations between the series of a summary: one table, a pure function of the summary.

Each pair is correlated over all checkpoints (group ``all``), within families pooled (``within``)
and for each family with at least three usable checkpoints (``family:<name>``). A checkpoint that
was planned for x or y but has no usable value of both counts in ``n_missing``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import pydantic

from tasks.coefficients import Method
from tasks.correlation import (
    MIN_FOR_R,
    CorrelationEstimate,
    Transform,
    correlate,
    derived_seed,
    transformed,
)

_FLOATS = {"value": "float64", "stderr": "float64"}
COLUMNS = {
    "x": "str", "y": "str", "transform_x": "str", "transform_y": "str", "group": "str",
    "method": "str", "r": "float64", "r_corrected": "float64", "ci_low": "float64",
    "ci_high": "float64", "n": "int64", "n_missing": "int64", "reason": "str",
}  # fmt: skip


class CorrelationPair(pydantic.BaseModel):
    """Two series to correlate: a ``[[correlations]]`` table of the manifest.

    Attributes:
        x: Series on the horizontal axis, such as ``"normalized_mls"`` or ``"mls@dense"``.
        y: Series on the vertical axis.
        transform_x: Scale of x: ``"log"`` (default), ``"sqrt"`` or ``"identity"``.
        transform_y: Scale of y.
        methods: Which coefficients.
        max_relative_stderr: Leave out checkpoints where the standard error of x or y, over its
            value, is larger. The paper's Fig. 4 has 0.15.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    x: str = pydantic.Field(min_length=1)
    y: str = pydantic.Field(min_length=1)
    transform_x: Transform = "log"
    transform_y: Transform = "log"
    methods: tuple[Method, ...] = pydantic.Field(
        default=("pearson", "spearman", "kendall"), min_length=1
    )
    max_relative_stderr: float | None = pydantic.Field(default=None, gt=0)

    @pydantic.model_validator(mode="after")
    def _is_a_pair(self) -> CorrelationPair:
        if self.x == self.y:
            raise ValueError(f"x and y are both {self.x!r}; expected two different series")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods names a method twice: {list(self.methods)!r}")
        return self


def correlation_table(
    summary: pd.DataFrame,
    pairs: Sequence[CorrelationPair],
    *,
    seed: int,
    num_bootstrap: int = 2000,
) -> pd.DataFrame:
    """Correlate the pairs over the checkpoints of a summary.

    Args:
        summary: One row per (checkpoint, series) with ``checkpoint``, ``family``, ``series``,
            ``value`` and ``stderr``; planned but unmeasured ones have value NaN. Order is free.
        pairs: What to correlate.
        seed: The manifest's seed.
        num_bootstrap: Replicates per interval.

    Returns:
        One row per pair, group and method, in the order of ``pairs``. Equal summaries give equal
        bytes. ``reason`` says why a number is missing, or what to know before trusting it.
    """
    rows = []
    for pair in dict.fromkeys(pairs):
        groups = _groups(paired_points(summary, pair), pair)
        replicates = dict.fromkeys(pair.methods, num_bootstrap)
        rows += correlation_rows(summary, pair, groups, seed=seed, num_bootstrap=replicates)
    return correlation_frame(rows)


def correlation_rows(
    summary: pd.DataFrame,
    pair: CorrelationPair,
    groups: Iterable[tuple[str, pd.DataFrame]],
    *,
    seed: int,
    num_bootstrap: Mapping[Method, int],
) -> list[tuple[object, ...]]:
    """Rows of one pair: each group of its ``paired_points`` with each of its methods.

    The group ``within`` is correlated within families. ``num_bootstrap`` is per method; 0 gives no
    interval.
    """
    rows = []
    for group, members in groups:
        notes = [_unknown_series(summary, pair), _left_out(members, pair)]
        for method in pair.methods:
            names = (pair.x, pair.y, pair.transform_x, pair.transform_y, group, method)
            estimate = correlate(
                members["x"],
                members["y"],
                members["x_stderr"],
                members["y_stderr"],
                transform_x=pair.transform_x,
                transform_y=pair.transform_y,
                method=method,
                families=list(members["family"]) if group == "within" else None,
                num_bootstrap=num_bootstrap[method],
                seed=derived_seed(seed, *names),
            )
            rows.append((*names, *_cells(estimate, notes)))
    return rows


def correlation_frame(rows: Sequence[tuple[object, ...]]) -> pd.DataFrame:
    """Rows as a table with the columns and types of ``COLUMNS``."""
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def paired_points(summary: pd.DataFrame, pair: CorrelationPair) -> pd.DataFrame:
    """Checkpoints planned for either series, one per row and sorted by name.

    Columns: checkpoint, family, x, x_stderr, y, y_stderr, imprecise (a standard error above the
    pair's limit: its value is NaN here), usable (both values finite and inside their transforms'
    domains). Raises ValueError if a checkpoint has two rows of one series.
    """
    columns = ["checkpoint", "family", "series", "value", "stderr"]
    rows = summary.loc[summary["series"].isin([pair.x, pair.y]), columns]
    twice = rows[rows.duplicated(["checkpoint", "series"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"summary has {first['checkpoint']!r} twice for series {first['series']!r}; expected "
            "one row per checkpoint and series. Give the measurements different labels."
        )
    points = rows.drop_duplicates("checkpoint").set_index("checkpoint")[["family"]].sort_index()
    points["family"] = points["family"].fillna("")
    points["imprecise"] = False
    for axis, series in (("x", pair.x), ("y", pair.y)):
        found = rows[rows["series"] == series].set_index("checkpoint").astype(_FLOATS)
        points[axis], points[f"{axis}_stderr"] = found["value"], found["stderr"]
        if pair.max_relative_stderr is not None:
            limit = pair.max_relative_stderr * points[axis].abs()
            wide = points[f"{axis}_stderr"] > limit
            points.loc[wide, axis] = np.nan
            points["imprecise"] |= wide
    x, _ = transformed(points["x"], points["x_stderr"], pair.transform_x)
    y, _ = transformed(points["y"], points["y_stderr"], pair.transform_y)
    points["usable"] = np.isfinite(x) & np.isfinite(y)
    return points.reset_index()


def _groups(points: pd.DataFrame, pair: CorrelationPair) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "all", points
    yield "within", points
    usable = points.loc[points["usable"], "family"].value_counts()
    for family in sorted(usable.index[usable >= MIN_FOR_R]):
        yield f"family:{family}", points.loc[points["family"] == family, :]


def _unknown_series(summary: pd.DataFrame, pair: CorrelationPair) -> str:
    known = set(summary["series"])
    unknown = [repr(name) for name in (pair.x, pair.y) if name not in known]
    return f"this run has no series {' or '.join(unknown)}" if unknown else ""


def _left_out(members: pd.DataFrame, pair: CorrelationPair) -> str:
    count = int(members["imprecise"].to_numpy().sum())
    if not count:
        return ""
    return f"{count} missing for a relative standard error above {pair.max_relative_stderr:g}"


def _cells(estimate: CorrelationEstimate, notes: Sequence[str]) -> tuple[object, ...]:
    reason = "; ".join(note for note in (*notes, estimate.reason) if note)
    return (
        estimate.r, estimate.r_corrected, estimate.ci_low, estimate.ci_high,
        estimate.n, estimate.n_missing, reason,
    )  # fmt: skip
