"""Shards to tables: a pure function of the shards and the manifest.

Running it again, in any order, on any machine with the same libraries, gives the same bytes of
``measurements``, ``summary`` and ``correlations``. Times, hosts and attempts are provenance; they
are in ``units`` and ``failures`` only. Every planned checkpoint has its rows, measured or not.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.correlate import COLUMNS, correlation_table
from pipeline.coverage import missing
from pipeline.entries import Manifest
from pipeline.plan import Plan, SpecPlan
from pipeline.query import units_table
from pipeline.schema import MEASUREMENT_SCHEMA, UNITS_SCHEMA
from pipeline.shards import Quarantined, Shard, read_shards
from pipeline.specs import Spec
from pipeline.store import Store
from pipeline.tables import frame_columns, spec_frame
from tasks.measurement import Estimate, Status
from tasks.training_results import summarize_training

NUM_BOOTSTRAP = 2000

_PROVENANCE = ("seconds", "code_version", "torch_version", "timm_version")
_NOT_TRAINED = "its checkpoint is not trained yet. Run: flatcensus launch MANIFEST"


@dataclass(frozen=True)
class Tables:
    """The reduced tables of a run."""

    measurements: pd.DataFrame
    summary: pd.DataFrame
    correlations: pd.DataFrame
    units: pd.DataFrame
    failures: pd.DataFrame

    def arrow(self) -> Mapping[str, pa.Table]:
        """The tables for DuckDB and Parquet: the same columns and types whatever they hold."""
        return {
            name: pa.Table.from_pandas(getattr(self, name), schema=schema, preserve_index=False)
            for name, schema in TABLE_SCHEMAS.items()
        }


def planned_shards(
    plan: Plan, store: Store, *, quarantined: list[Quarantined] | None = None
) -> dict[str, list[Shard]]:
    """The shards of a plan's specs, by key. Damaged ones are set aside: then plan again."""
    shards: dict[str, list[Shard]] = defaultdict(list)
    keys = {item.spec.key for item in plan.specs}
    for shard in read_shards(store, keys, quarantined=quarantined):
        shards[shard.unit.spec_key].append(shard)
    return shards


def reduce_run(manifest: Manifest, plan: Plan, shards: Mapping[str, list[Shard]]) -> Tables:
    """Build all tables of what the manifest wants from a plan and the shards of its specs."""
    frames, lines = [], []
    for item in plan.specs:
        found = shards.get(item.spec.key, [])
        frame = spec_frame(found, item.wanted if item.spec.kind == "measure" else None)
        if len(frame):
            frames.append(_measurement_rows(item.spec, frame))
        lines.extend(_summary_lines(item, frame, found))
    lines.extend(_missing_lines(manifest, plan))
    summary = pd.DataFrame(lines, columns=list(_SUMMARY_TYPES)).astype(_SUMMARY_TYPES)
    units = units_table([s for key in sorted(shards) for s in shards[key]]).to_pandas()
    measurements = (
        pd.concat(frames, ignore_index=True)
        if frames
        else pd.DataFrame(columns=TABLE_SCHEMAS["measurements"].names)
    )
    return Tables(
        measurements=measurements,
        summary=summary,
        correlations=correlation_table(
            summary, manifest.correlations, seed=manifest.seed, num_bootstrap=NUM_BOOTSTRAP
        ),
        units=units,
        failures=_failures(units, plan),
    )


def write_tables(tables: Tables, store: Store) -> None:
    """Publish the tables as ``tables/<name>.parquet``, each replaced in one step."""
    for name, table in tables.arrow().items():
        sink = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(None), sink, compression="zstd")
        store.put(f"tables/{name}.parquet", sink.getvalue())


_SUMMARY_TYPES = {
    "checkpoint": "str", "family": "str", "tag": "str", "metric": "str", "label": "str",
    "series": "str", "quantity": "str", "value": "float64", "stderr": "float64",
    "stderr_draws": "float64", "ci_low": "float64", "ci_high": "float64",
    "error_bound": "float64", "num_samples": "int64", "num_missing": "int64",
    "num_rows": "int64", "num_probes": "int64", "forward_equivalents": "float64",
    "status": "str", "status_text": "str", "spec_key": "str",
}  # fmt: skip

_FAILURE_COLUMNS = (
    "checkpoint", "family", "metric", "label", "start", "stop", "draw_start", "draw_stop",
    "failure_class", "failure_type", "failure_message", "failure_hint", "failure_traceback",
)  # fmt: skip


def _schema(types: Mapping[str, str]) -> pa.Schema:
    arrow = {"str": pa.string(), "float64": pa.float64(), "int64": pa.int64()}
    return pa.schema([pa.field(name, arrow[kind]) for name, kind in types.items()])


TABLE_SCHEMAS = {
    "measurements": pa.schema(
        [
            pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type)
            for f in MEASUREMENT_SCHEMA
            if f.name not in _PROVENANCE
        ]
    ),
    "summary": _schema(_SUMMARY_TYPES),
    "correlations": _schema(COLUMNS),
    "units": UNITS_SCHEMA,
    "failures": pa.schema([UNITS_SCHEMA.field(name) for name in _FAILURE_COLUMNS]),
}


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


def _summary_lines(
    item: SpecPlan, frame: pd.DataFrame, shards: list[Shard]
) -> list[dict[str, object]]:
    """One line per quantity: the estimate if every wanted index has a row, else the reason."""
    spec = item.spec
    if item.todo or item.failed:
        failed = bool(item.failed)
        text = _failure_text(shards) if failed else Status.INCOMPLETE.sentence
        lacking = missing([block.samples for block in (*item.todo, *item.failed)], ())
        return [
            _line(spec, _nothing(quantity), status="failed" if failed else "incomplete",
                  text=text, num_missing=sum(map(len, lacking)))
            for quantity in spec.quantities
        ]  # fmt: skip
    columns = frame_columns(frame)
    if spec.entry is None:
        estimates = summarize_training(columns)
    else:
        estimates = spec.entry.measurement.summarize(columns)
    return [_line(spec, e, status=str(e.status), text=e.status.sentence) for e in estimates]


def _missing_lines(manifest: Manifest, plan: Plan) -> list[dict[str, object]]:
    """Lines of checkpoints that have no specs: not trained yet, or not to be had."""
    lines: list[dict[str, object]] = []
    families = {entry.name: entry.family for entry in manifest.train}
    absent = [(name, families[name], "", "incomplete", _NOT_TRAINED) for name in plan.waiting]
    absent += [(u.checkpoint, u.family, u.tag, "failed", u.reason) for u in plan.unresolved]
    for name, family, tag, status, text in absent:
        for entry in manifest.measurements:
            for quantity in entry.measurement.quantities:
                line = dict.fromkeys(_SUMMARY_TYPES, "") | _numbers(_nothing(quantity))
                lines.append(
                    line | {
                        "checkpoint": name, "family": family, "tag": tag, "metric": entry.metric,
                        "label": entry.label, "series": entry.series(quantity),
                        "num_missing": manifest.data.samples, "status": status,
                        "status_text": text,
                    }
                )  # fmt: skip
    return lines


def _line(
    spec: Spec, estimate: Estimate, *, status: str, text: str, num_missing: int = 0
) -> dict[str, object]:
    return {
        "checkpoint": spec.checkpoint, "family": spec.family, "tag": spec.tag,
        "metric": spec.metric, "label": spec.label, "series": spec.series(estimate.quantity),
        **_numbers(estimate), "num_missing": num_missing, "status": status, "status_text": text,
        "spec_key": spec.key,
    }  # fmt: skip


def _numbers(estimate: Estimate) -> dict[str, object]:
    names = (
        "quantity", "value", "stderr", "stderr_draws", "ci_low", "ci_high", "error_bound",
        "num_samples", "num_rows", "num_probes", "forward_equivalents",
    )  # fmt: skip
    return {name: getattr(estimate, name) for name in names}


def _nothing(quantity: str) -> Estimate:
    nan = math.nan
    return Estimate(quantity, nan, nan, nan, nan, num_samples=0, num_rows=0)


def _failure_text(shards: list[Shard]) -> str:
    failures = [s.unit for s in shards if s.unit.failure is not None]
    latest = max(failures, key=lambda unit: (unit.generation, unit.start))
    assert latest.failure is not None
    return f"{latest.failure.type}: {latest.failure.message}"


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
                "failure_hint": "Mend the cause, then: flatcensus resume RUN",
            }
            for u in plan.unresolved
        ],
        columns=columns,
    )  # fmt: skip
    integers = dict.fromkeys(("start", "stop", "draw_start", "draw_stop"), "Int64")
    return pd.concat([f.astype(integers) for f in (*failed, absent)], ignore_index=True)
