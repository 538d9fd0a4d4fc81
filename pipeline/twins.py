"""Estimates against an oracle: series of one quantity measured in two ways, compared.

A series ``quantity@dense`` (or ``@exact``, ``@oracle``) is the reference of the other series of its
quantity; without one, the series that comes first by name is. The two must have seen the same
images, then only numerical error and random draws may separate them:

    |value − reference| ≤ bound + bound_reference + 1e-6 |reference|          certificate
    |value − reference| ≤ 3 √(stderr_draws² + stderr_draws_reference²)        random draws

The 1e-6 allows for float32 rounding of the mean where both are called exact.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

REFERENCE_LABELS = ("dense", "exact", "oracle")
ROUNDING = 1e-6  # some float32 units in the last place, relative
DRAWS_DEVIATIONS = 3.0  # chosen: 0.3 % of right pairs fail it

COLUMNS = (
    "checkpoint", "series", "reference", "value", "reference_value", "relative_difference",
    "bound", "verdict", "why",
)  # fmt: skip


def compare_twins(summary: pd.DataFrame) -> pd.DataFrame:
    """Compare every series that has a twin with its reference, per checkpoint.

    Returns:
        One row per (checkpoint, series with a reference), sorted. ``bound`` is what the difference
        may be, ``verdict`` one of ``yes``, ``no`` and ``–`` (cannot be told), ``why`` says what it
        rests on.
    """
    records = {(r["checkpoint"], r["series"]): r for r in summary.to_dict("records")}
    rows = []
    for series, reference in _twins(summary).items():
        for checkpoint in sorted(set(summary["checkpoint"])):
            one = records.get((checkpoint, series))
            other = records.get((checkpoint, reference))
            if one is not None and other is not None:
                rows.append(_compared(one, other))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["series", "checkpoint"], kind="stable", ignore_index=True)


def _twins(summary: pd.DataFrame) -> dict[str, str]:
    """Series to their references."""
    by_quantity: dict[str, list[str]] = {}
    for series in sorted(set(summary["series"])):
        by_quantity.setdefault(series.partition("@")[0], []).append(series)

    def preference(series: str) -> tuple[bool, str]:
        return series.partition("@")[2] not in REFERENCE_LABELS, series

    twins = {}
    for group in by_quantity.values():
        reference = min(group, key=preference)
        twins |= {series: reference for series in group if series != reference}
    return twins


def _compared(one: Mapping[Hashable, Any], other: Mapping[Hashable, Any]) -> tuple[Any, ...]:
    value, expected = float(one["value"]), float(other["value"])
    difference = abs(value - expected)
    relative = difference / abs(expected) if expected else math.nan
    certificate = float(one["error_bound"]) + float(other["error_bound"])
    draws = math.hypot(_zero(one["stderr_draws"]), _zero(other["stderr_draws"]))
    if not math.isfinite(difference):
        bound, why = math.nan, "one of the two is missing or not finite"
    elif one["num_samples"] != other["num_samples"]:
        bound = math.nan
        why = f"{one['num_samples']} images against {other['num_samples']}: not comparable"
    elif math.isfinite(certificate):
        bound, why = certificate + ROUNDING * abs(expected), "numerical certificates"
        if draws:
            bound += DRAWS_DEVIATIONS * draws
            why = f"certificates and {DRAWS_DEVIATIONS:g} standard errors of the draws"
    elif draws:
        bound = DRAWS_DEVIATIONS * draws
        why = f"{DRAWS_DEVIATIONS:g} standard errors of the draws"
    else:
        bound, why = math.nan, "neither certificates nor random draws"
    verdict = "–" if math.isnan(bound) else "yes" if difference <= bound else "no"
    return (one["checkpoint"], one["series"], other["series"], value, expected, relative, bound,
            verdict, why)  # fmt: skip


def _zero(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0
