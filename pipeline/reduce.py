"""Shards to tables: a pure function of the shards and the manifest.

Running it again, in any order, on any machine with the same libraries, gives the same bytes of
``measurements``, ``summary``, ``layers``, ``bounds``, ``correlations`` and ``matrix``. Times, hosts
and attempts are provenance; they are in ``units`` and ``failures`` only. Every planned checkpoint
has its rows, measured or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa

from pipeline.correlate import COLUMNS, correlation_table
from pipeline.entries import Manifest
from pipeline.lines import (
    BOUND_TYPES,
    LAYER_TYPES,
    SUMMARY_TYPES,
    Line,
    absent_lines,
    bounds_without_result,
    check_lines,
    estimate_lines,
    layers_without_result,
    unfinished_lines,
)
from pipeline.matrix import matrix_table
from pipeline.memo import encode_table, forget, remember, table_key
from pipeline.plan import Plan
from pipeline.schema import MEASUREMENT_SCHEMA, UNITS_SCHEMA
from pipeline.shards import NOTHING, Found, Quarantined, read_found
from pipeline.specs import Spec
from pipeline.store import Store
from pipeline.tables import frame_columns, spec_frame
from pipeline.unit_table import units_table
from tasks.training_results import summarize_training

NUM_BOOTSTRAP = 2000

_PROVENANCE = ("seconds", "code_version", "torch_version", "timm_version")


@dataclass(frozen=True)
class Tables:
    """The reduced tables of a run. ``made_from`` is the folder's fingerprint, if it has one."""

    measurements: pd.DataFrame
    summary: pd.DataFrame
    layers: pd.DataFrame
    bounds: pd.DataFrame
    correlations: pd.DataFrame
    matrix: pd.DataFrame
    units: pd.DataFrame
    failures: pd.DataFrame
    made_from: str | None = None

    def arrow(self) -> Mapping[str, pa.Table]:
        """The tables for DuckDB and Parquet: the same columns and types whatever they hold."""
        return {
            name: pa.Table.from_pandas(getattr(self, name), schema=schema, preserve_index=False)
            for name, schema in TABLE_SCHEMAS.items()
        }


def planned_units(
    plan: Plan, store: Store, *, quarantined: list[Quarantined] | None = None
) -> dict[str, Found]:
    """The units of a plan's specs, by key. Damaged ones are set aside: then plan again."""
    keys = {item.spec.key for item in plan.specs}
    return dict(read_found(store, keys, quarantined=quarantined))


def reduce_run(manifest: Manifest, plan: Plan, units: Mapping[str, Found]) -> Tables:
    """Build all tables of what the manifest wants from a plan and the units of its specs."""
    frames: list[pd.DataFrame] = []
    summary: list[Line] = []
    layers: list[Line] = []
    bounds: list[Line] = []
    lacking: list[Line] = []
    for item in plan.specs:
        spec, found = item.spec, units.get(item.spec.key, NOTHING)
        frame = spec_frame(found, item.wanted if spec.kind == "measure" else None)
        if len(frame):
            frames.append(_measurement_rows(spec, frame))
        if item.state != "done":
            unfinished = unfinished_lines(item, found.units)
            summary += unfinished
            lacking += unfinished if spec.kind == "measure" else []
            continue
        columns = frame_columns(frame)
        if spec.entry is None:
            summary += estimate_lines(spec, summarize_training(columns))[0]
            continue
        networks, layer_wise = estimate_lines(spec, spec.entry.measurement.summarize(columns))
        summary += networks
        layers += layer_wise
        bounds += check_lines(spec, spec.entry.measurement.checks(columns))
    absent = absent_lines(manifest, plan)
    summary += absent
    lacking += absent
    layers += layers_without_result(lacking, layers)
    bounds += bounds_without_result(lacking, manifest)
    whole = _frame(summary, SUMMARY_TYPES)
    records = pa.concat_tables([NOTHING.units, *(units[key].units for key in sorted(units))])
    all_units = units_table(records).to_pandas()
    measurements = (
        pd.concat(frames, ignore_index=True)
        if frames
        else pd.DataFrame(columns=TABLE_SCHEMAS["measurements"].names)
    )
    return Tables(
        measurements=measurements,
        summary=whole,
        layers=_frame(layers, LAYER_TYPES),
        bounds=_frame(bounds, BOUND_TYPES),
        correlations=correlation_table(
            whole, manifest.correlations, seed=manifest.seed, num_bootstrap=NUM_BOOTSTRAP
        ),
        matrix=matrix_table(
            whole, manifest.pair_plot, seed=manifest.seed, num_bootstrap=NUM_BOOTSTRAP
        ),
        units=all_units,
        failures=_failures(all_units, plan),
    )


def write_tables(tables: Tables, store: Store) -> None:
    """Publish the tables as ``tables/<name>.parquet``, each replaced in one step."""
    data = {name: encode_table(table) for name, table in tables.arrow().items()}
    forget(store)
    for name, content in data.items():
        store.put(table_key(name), content)
    remember(store, tables.made_from, data)


# A run folder keeps the manifest as it was launched.
_MEND = "Mend the cause, then: flatcensus resume RUN; a manifest that was changed is launched again"
_FAILURE_COLUMNS = (
    "checkpoint", "family", "metric", "label", "start", "stop", "draw_start", "draw_stop",
    "failure_class", "failure_type", "failure_message", "failure_hint", "failure_traceback",
)  # fmt: skip


def _schema(types: Mapping[str, str]) -> pa.Schema:
    arrow = {
        "str": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "boolean": pa.bool_(),
    }  # fmt: skip
    return pa.schema([pa.field(name, arrow[kind]) for name, kind in types.items()])


TABLE_SCHEMAS = {
    "measurements": pa.schema(
        [
            pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type)
            for f in MEASUREMENT_SCHEMA
            if f.name not in _PROVENANCE
        ]
    ),
    "summary": _schema(SUMMARY_TYPES),
    "layers": _schema(LAYER_TYPES),
    "bounds": _schema(BOUND_TYPES),
    "correlations": _schema(COLUMNS),
    "matrix": _schema(COLUMNS),
    "units": UNITS_SCHEMA,
    "failures": pa.schema([UNITS_SCHEMA.field(name) for name in _FAILURE_COLUMNS]),
}


def _frame(lines: Sequence[Line], types: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame(lines, columns=list(types)).astype(types)


def _measurement_rows(spec: Spec, frame: pd.DataFrame) -> pd.DataFrame:
    """A spec's rows without provenance, named as this manifest names them."""
    rows = frame.drop(columns=list(_PROVENANCE))
    for name in rows.columns:
        if isinstance(rows[name].dtype, pd.CategoricalDtype):
            rows[name] = rows[name].astype(object)
    # Names are the manifest's, which may differ from those at the time of measuring.
    rows["checkpoint"], rows["family"], rows["label"] = spec.checkpoint, spec.family, spec.label
    rows["series"] = [spec.series(quantity) for quantity in rows["quantity"]]
    return rows


def _failures(units: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Failed ranges that nothing made up for, and checkpoints that could not be had."""
    columns = list(_FAILURE_COLUMNS)
    is_open = (units["status"] == "failed") & ~units["superseded"].astype(bool)
    by_key = dict(iter(units.loc[is_open].groupby("spec_key")))
    # Names are the manifest's: equal networks share their units, and folders may be renamed.
    failed = [
        by_key[s.key].assign(checkpoint=s.checkpoint, family=s.family, label=s.label)[columns]
        for s in (item.spec for item in plan.specs)
        if s.key in by_key
    ]
    absent = pd.DataFrame(
        [
            {
                "checkpoint": u.checkpoint, "family": u.family, "failure_class": "unresolved",
                "failure_type": "Unresolved", "failure_message": u.reason,
                "failure_hint": _MEND,
            }
            for u in plan.unresolved
        ],
        columns=columns,
    )  # fmt: skip
    integers = dict.fromkeys(("start", "stop", "draw_start", "draw_stop"), "Int64")
    return pd.concat([f.astype(integers) for f in (*failed, absent)], ignore_index=True)
