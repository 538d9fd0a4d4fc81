"""Lines of ``summary``, ``layers`` and ``bounds``: what measurements make of their rows.

``summary`` has one line per checkpoint and series, measured or not, and whole networks only:
correlations and counts rest on that. Layer-wise estimates are in ``layers``, inequalities in
``bounds``. Which layers and which inequalities a checkpoint without a result would have had nobody
knows; it has one line there that says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import pyarrow as pa

from pipeline.bounds_summary import MISSING, NO, UNDEFINED, YES
from pipeline.coverage import missing
from pipeline.entries import Manifest
from pipeline.plan import Plan, SpecPlan
from pipeline.specs import Spec
from tasks.measurement import Check, Estimate, Measurement, Status

Line = dict[str, object]

SUMMARY_TYPES = {
    "checkpoint": "str", "family": "str", "tag": "str", "metric": "str", "label": "str",
    "series": "str", "quantity": "str", "value": "float64", "stderr": "float64",
    "stderr_draws": "float64", "ci_low": "float64", "ci_high": "float64",
    "error_bound": "float64", "num_samples": "int64", "num_missing": "int64",
    "num_rows": "int64", "num_probes": "int64", "forward_equivalents": "float64",
    "status": "str", "status_text": "str", "spec_key": "str",
}  # fmt: skip
LAYER_TYPES = dict(list(SUMMARY_TYPES.items())[:7]) | {"layer": "str"} | SUMMARY_TYPES
BOUND_TYPES = {
    "checkpoint": "str", "family": "str", "tag": "str", "metric": "str", "label": "str",
    "bound": "str", "kind": "str", "layer": "str", "left": "float64", "right": "float64",
    "slack_log10": "float64", "holds": "str", "is_theorem": "boolean",
    "conditions_met": "boolean", "conditions": "str", "num_samples": "int64", "spec_key": "str",
}  # fmt: skip

_NOT_TRAINED = "its checkpoint is not trained yet. Run: flatcensus launch MANIFEST"


def estimate_lines(spec: Spec, estimates: Iterable[Estimate]) -> tuple[list[Line], list[Line]]:
    """Lines of ``summary`` and of ``layers`` for the estimates of one spec."""
    summary, layers = [], []
    for estimate in estimates:
        line = _line(spec, estimate, status=str(estimate.status), text=estimate.status.sentence)
        if estimate.layer is None:
            summary.append(line)
        else:
            layers.append(line | {"layer": estimate.layer})
    return summary, layers


def check_lines(spec: Spec, checks: Iterable[Check]) -> list[Line]:
    """Lines of ``bounds`` for the checks of one spec."""
    names = {None: UNDEFINED, True: YES, False: NO}
    return [
        {
            "checkpoint": spec.checkpoint, "family": spec.family, "tag": spec.tag,
            "metric": spec.metric, "label": spec.label, "bound": check.bound, "kind": check.kind,
            "layer": check.layer, "left": check.left, "right": check.right,
            "slack_log10": check.slack_log10, "holds": names[check.holds],
            "is_theorem": check.is_theorem, "conditions_met": check.conditions_met,
            "conditions": check.conditions, "num_samples": check.num_samples,
            "spec_key": spec.key,
        }
        for check in checks
    ]  # fmt: skip


def unfinished_lines(item: SpecPlan, units: pa.Table) -> list[Line]:
    """Lines of ``summary`` for a spec that lacks rows, with the reason: one per quantity.

    Args:
        item: What is wanted of the spec.
        units: The records of its units.
    """
    failed = bool(item.failed)
    text = _failure_text(units) if failed else Status.INCOMPLETE.sentence
    lacking = missing([block.samples for block in (*item.todo, *item.failed)], ())
    return [
        _line(item.spec, _nothing(quantity), status="failed" if failed else "incomplete",
              text=text, num_missing=sum(map(len, lacking)))
        for quantity in item.spec.quantities
    ]  # fmt: skip


def absent_lines(manifest: Manifest, plan: Plan) -> list[Line]:
    """Lines of ``summary`` for checkpoints without specs: not trained yet, or not to be had."""
    lines: list[Line] = []
    families = {entry.name: entry.family for entry in manifest.train}
    absent = [(name, families[name], "", "incomplete", _NOT_TRAINED) for name in plan.waiting]
    absent += [(u.checkpoint, u.family, u.tag, "failed", u.reason) for u in plan.unresolved]
    for name, family, tag, status, text in absent:
        for entry in manifest.measurements:
            for quantity in entry.measurement.quantities:
                line = dict.fromkeys(SUMMARY_TYPES, "") | _numbers(_nothing(quantity))
                lines.append(
                    line | {
                        "checkpoint": name, "family": family, "tag": tag, "metric": entry.metric,
                        "label": entry.label, "series": entry.series(quantity),
                        "num_missing": manifest.data.samples, "status": status,
                        "status_text": text,
                    }
                )  # fmt: skip
    return lines


def layers_without_result(lacking: Iterable[Line], layers: Iterable[Line]) -> list[Line]:
    """Lines of ``layers`` without a layer, for what gave layer-wise estimates elsewhere.

    Args:
        lacking: Lines of ``summary`` that have no result.
        layers: Lines of ``layers`` that have one.
    """
    known: dict[object, dict[object, object]] = {}
    for line in layers:
        series = known.setdefault((line["metric"], line["label"]), {})
        series[line["quantity"]] = line["series"]
    return [
        line | {"quantity": quantity, "series": series, "layer": None}
        for line in _once(lacking)
        for quantity, series in known.get((line["metric"], line["label"]), {}).items()
    ]


def bounds_without_result(lacking: Iterable[Line], manifest: Manifest) -> list[Line]:
    """One line of ``bounds`` per measurement of inequalities that has no result.

    Args:
        lacking: Lines of ``summary`` that have no result.
        manifest: What is measured.
    """
    checking = {
        (entry.metric, entry.label)
        for entry in manifest.measurements
        if type(entry.measurement).checks is not Measurement.checks
    }
    nothing: Mapping[str, object] = {
        "bound": "", "kind": "", "layer": None, "left": math.nan, "right": math.nan,
        "slack_log10": math.nan, "holds": MISSING, "is_theorem": None, "conditions_met": None,
    }  # fmt: skip
    kept = ("checkpoint", "family", "tag", "metric", "label", "num_samples", "spec_key")
    return [
        {**{name: line[name] for name in kept}, **nothing, "conditions": line["status_text"]}
        for line in _once(lacking)
        if (line["metric"], line["label"]) in checking
    ]


def _once(lines: Iterable[Line]) -> list[Line]:
    """The first line of every checkpoint and measurement."""
    first: dict[tuple[object, ...], Line] = {}
    for line in lines:
        first.setdefault((line["checkpoint"], line["metric"], line["label"]), line)
    return list(first.values())


def _line(spec: Spec, estimate: Estimate, *, status: str, text: str, num_missing: int = 0) -> Line:
    return {
        "checkpoint": spec.checkpoint, "family": spec.family, "tag": spec.tag,
        "metric": spec.metric, "label": spec.label, "series": spec.series(estimate.quantity),
        **_numbers(estimate), "num_missing": num_missing, "status": status, "status_text": text,
        "spec_key": spec.key,
    }  # fmt: skip


def _numbers(estimate: Estimate) -> Line:
    names = (
        "quantity", "value", "stderr", "stderr_draws", "ci_low", "ci_high", "error_bound",
        "num_samples", "num_rows", "num_probes", "forward_equivalents",
    )  # fmt: skip
    return {name: getattr(estimate, name) for name in names}


def _nothing(quantity: str) -> Estimate:
    nan = math.nan
    return Estimate(quantity, nan, nan, nan, nan, num_samples=0, num_rows=0)


def _failure_text(units: pa.Table) -> str:
    names = ["status", "generation", "start", "failure_type", "failure_message"]
    failures = [u for u in units.select(names).to_pylist() if u["status"] == "failed"]
    latest = max(failures, key=lambda unit: (unit["generation"], unit["start"]))
    return f"{latest['failure_type']}: {latest['failure_message']}"
