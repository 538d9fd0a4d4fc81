"""What the benchmarks should show, beside what they do show. Nothing fails on a missed goal."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Rows = list[dict[str, Any]]

ONE_BY_ONE, BATCHED = "authors, one by one", "authors, batched"
CERTIFIED, OBSERVED = "Lanczos 1e-3 certified", "Lanczos, 1 % observed"


@dataclass(frozen=True)
class Goal:
    """A bound, one measured value per network or launch, and the error that goes with them.

    It is met when every value is on the right side.
    """

    subject: str
    what: str
    kind: Literal[">=", "<="]
    bound: float
    measured: tuple[float, ...]
    error: str
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether every measured value keeps the bound."""
        if self.kind == ">=":
            return min(self.measured) >= self.bound
        return max(self.measured) <= self.bound

    @property
    def shown(self) -> str:
        """The measured values for reading: one, or smallest to largest."""
        values = [f"{v:.3g}" for v in (min(self.measured), max(self.measured))]
        return "–".join(dict.fromkeys(values)) + self.unit


def sensitivity_goals(rows: Rows) -> list[Goal]:
    """Against the published search: as its script runs it, and batched as ours is."""
    networks = _by(rows, "network")

    def of(method: str, key: str) -> tuple[float, ...]:
        return tuple(_one(n, method=method)[key] for n in networks)

    goals = []
    for recipe, words in ((ONE_BY_ONE, "as published, image by image"), (BATCHED, "batched")):
        for ours, what, bound in (
            (CERTIFIED, "certified to 1e-3", 2.0),
            (OBSERVED, "within 1 % of the truth", 5.0),
        ):
            pairs = zip(of(recipe, "seconds_per_image"), of(ours, "seconds_per_image"), strict=True)
            error = f"observed error at most {max(of(ours, 'max_error')):.1g}"
            if ours == CERTIFIED:
                error += f", certified width {max(of(ours, 'certified_width')):.1g}"
            error += f"; published search off by {_range(of(recipe, 'median_error'))} (median)"
            goals.append(
                Goal("sensitivity", f"{what}, times faster than the search {words}",
                     ">=", bound, tuple(theirs / mine for theirs, mine in pairs), error, "×")
            )  # fmt: skip
    for key, words in (("forward_equivalents", "counted"), ("forwards", "by the clock")):
        error = f"observed error at most {max(of(CERTIFIED, 'max_error')):.1g}"
        goals.append(
            Goal("sensitivity", f"certified to 1e-3, forwards per image, {words}",
                 "<=", 40.0, of(CERTIFIED, key), error)
        )  # fmt: skip
    return goals


def jacobian_goals(rows: Rows) -> list[Goal]:
    """Probes against all rows of Jacobians of 1000 outputs."""
    goals = []
    for method, words in (
        ("probes, 2 % of the mean", "norm and dimensionality to 2 % of the mean over 4 images"),
        ("probes, 2 % per image", "norm and dimensionality to 2 % per image"),
    ):
        found = [row for row in rows if row["method"] == method]
        stated = _range([row["stated_mean" if "mean" in method else "stated_max"] for row in found])
        error = f"stated error {stated}, probes {_range([row['probes'] for row in found], '.0f')}"
        error += f", observed error of the mean {_range([row['mean_error'] for row in found])}"
        goals.append(
            Goal("jacobian", f"{words}, times less time than all rows", ">=", 10.0,
                 tuple(row["speedup"] for row in found), error, "×")
        )  # fmt: skip
    return goals


def layer_goals(rows: Rows) -> list[Goal]:
    """Spectra through the head against all rows, rows of all layers against the input's."""
    head = _one(rows, question="spectrum", way="through the head")
    layers = _one(rows, question="rows", way="input and all layers")
    difference = f"singular values differ by {head['error']:.1g} of the largest"
    return [
        Goal("layers", f"exact spectra from {head['rows']} rows through the head, times less time "
             "than from all rows", ">=", 2.0, (head["ratio"],), difference, "×"),
        Goal("layers", "rows of the input and of all layers, in time of the input's rows", "<=",
             1.2, (1 / layers["ratio"],), "the same rows", "×"),
    ]  # fmt: skip


def sharpness_goals(rows: Rows) -> list[Goal]:
    """Against 100 images with 50 one-sided draws each, at the same standard error."""
    goals = []
    for rho, draws in itertools.product((0.1, 0.03), (2, 1)):
        found = [
            r for r in rows if (r["question"], r["rho"], r["draws"]) == ("population", rho, draws)
        ]
        words = f"rho {rho}, {draws} draw{'s (the default)' if draws == 2 else ''}"
        ours = _range([row["relative_stderr"] for row in found], ".1%")
        recipe = _range([row["recipe_relative_stderr"] for row in found], ".1%")
        error = f"standard error {ours}, recipe's {recipe}"
        for key, what, bound, extra in (
            ("forwards", "fewer image-forwards", 10.0, f"; ratio {_uncertainty(found)}"),
            ("speedup", "less time", 30.0, ""),
        ):
            goals.append(
                Goal("sharpness", f"population mean, {words}: times {what}", ">=", bound,
                     tuple(row[key] for row in found), error + extra, "×")
            )  # fmt: skip
    for rho, bound in ((0.1, 6.0), (0.03, 40.0), (0.01, 300.0)):
        found = [r for r in rows if (r["question"], r["rho"]) == ("fixed images", rho)]
        error = _range([row["recipe_relative_stderr"] for row in found], ".1%")
        goals.append(
            Goal("sharpness", f"images held fixed, rho {rho}: times fewer image-forwards",
                 ">=", bound, tuple(row["forwards"] for row in found),
                 f"standard error {error}, the same; ratio {_uncertainty(found)}", "×")
        )  # fmt: skip
    return goals


def precision_goals(rows: Rows) -> list[Goal]:
    """What float32 costs against float64."""
    width = f"intervals ± {_range([row['width'] for row in rows])}"
    spread = f"standard error {_range([row['sharpness_relative_stderr'] for row in rows], '.0%')}"
    return [
        Goal("precision", "float32: intervals that hold every σ₁ of float64, share of networks",
             ">=", 1.0, (float(np.mean([row["held"] for row in rows])),), width),
        Goal("precision", "float32: relative error of σ₁", "<=", 1e-3,
             tuple(row["sigma"] for row in rows), width),
        Goal("precision", "float32: relative error of adaptive sharpness, ρ = 0.1", "<=", 1e-2,
             tuple(row["sharpness"] for row in rows), spread),
    ]  # fmt: skip


def engine_goals(rows: Rows) -> list[Goal]:
    """Fixed costs of a unit and of a change of checkpoint."""
    goals = []
    for executor in dict.fromkeys(row["executor"] for row in rows):
        found = [row for row in rows if row["executor"] == executor]
        few = min(found, key=lambda row: row["checkpoints"])
        many = max(found, key=lambda row: row["checkpoints"])
        goals.append(
            Goal("engine", f"{executor}: seconds per unit beside its measuring", "<=", 0.05,
                 (few["overhead_per_unit"],), f"median {few['gap']:.3f} s", " s")
        )  # fmt: skip
        goals.append(
            Goal("engine", f"{executor}: seconds per change of checkpoint beside loading", "<=",
                 0.5, (many["switch"],), f"loading {many['loading']:.2f} s more", " s")
        )  # fmt: skip
    return goals


def scale_goals(rows: Rows) -> list[Goal]:
    """What many units take by themselves, and how that grows."""
    plans = [row for row in rows if row["part"] == "plan"]
    launches = [row for row in rows if row["part"] == "launch"]
    specs = ", ".join(row["specs"] for row in plans)
    most = f"up to {max(row['units'] for row in launches):,} units"

    def goal(what: str, bound: float, measured: Iterable[float], error: str = most) -> Goal:
        return Goal("scale", what, "<=", bound, tuple(measured), error, " s")

    before_first = [sum(p[k] for k in ("resolve", "plan", "freeze", "first_unit")) for p in plans]
    return [
        goal(f"plan of {plans[0]['units']:,} units of which half are done, to the first unit",
             30.0, before_first, specs),
        Goal("scale", "peak memory of that", "<=", 1.5, tuple(p["bytes"] / 1e9 for p in plans),
             f"{min(p['bytes_at_start'] for p in plans) / 1e9:.2f} GB of it is libraries", " GB"),
        goal("seconds of a slot per unit beside its measuring", 0.05,
             (row["overhead_per_unit"] for row in launches)),
        goal("driver's death to the first unit of the next one, half done", 15.0,
             (row["restart"] for row in launches)),
        goal("status, whole command", 2.0, (row["status_after_compact"] for row in launches)),
        goal("query after compact, whole command", 2.0,
             (row["query_after_compact"] for row in launches)),
    ]  # fmt: skip


def cost_goals(rows: Rows) -> list[Goal]:
    """Predictions of units of networks that no rate was fitted to."""
    factors = [max(row["ratio"], 1 / row["ratio"]) for row in rows]
    networks = len({row["network"] for row in rows})
    error = f"worst {max(factors):.2g}, {len(rows)} units of {networks} networks"
    return [
        Goal("cost", "time of units of unseen architectures, median factor off", "<=", 1.5,
             (statistics.median(factors),), error, "×")
    ]  # fmt: skip


def _by(rows: Rows, key: str) -> list[Rows]:
    values = dict.fromkeys(row[key] for row in rows)
    return [[row for row in rows if row[key] == value] for value in values]


def _one(rows: Rows, **fields: object) -> dict[str, Any]:
    (row,) = [r for r in rows if all(r[k] == v for k, v in fields.items())]
    return row


def _range(values: Iterable[float], form: str = ".1g") -> str:
    values = list(values)
    return "–".join(dict.fromkeys(format(v, form) for v in (min(values), max(values))))


def _uncertainty(found: Rows) -> str:
    return "± " + _range([row["forwards_stderr"] for row in found], ".2g")
