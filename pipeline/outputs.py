"""What a finished launch leaves for readers: figures and report.html in the run folder."""

from __future__ import annotations

import platform
from pathlib import Path

import pandas as pd

from pipeline.figures import scatter
from pipeline.plan import Plan
from pipeline.reduce import Tables
from pipeline.report import finding, write_report
from pipeline.run import Run
from pipeline.versions import versions


def write_outputs(run: Run, plan: Plan, tables: Tables) -> list[Path]:
    """Draw every pair and write the report. Returns the report first, then the figures."""
    figures: list[Path] = []
    for pair in run.manifest.correlations:
        stem = run.store.path(f"figures/{pair.y} against {pair.x}".replace(" ", "_"))
        stem.parent.mkdir(parents=True, exist_ok=True)
        figures += scatter(tables.summary, pair, tables.correlations, stem, pdf=True)
    report = run.store.path("report.html")
    write_report(
        report,
        title=run.manifest.name,
        manifest_toml=run.manifest.text,
        summary=tables.summary,
        correlations=tables.correlations,
        units=tables.units,
        failures=tables.failures,
        checks=_checks(plan, tables),
        figures=figures,
        provenance=_provenance(run, plan, tables),
    )
    return [report, *figures]


def headline(tables: Tables) -> list[str]:
    """One sentence per pair: coefficients, intervals, counts."""
    everyone = tables.correlations[tables.correlations["group"] == "all"]
    names: pd.DataFrame = everyone.loc[:, ["x", "y"]].drop_duplicates()
    lines = []
    for x, y in names.itertuples(index=False):
        rows: pd.DataFrame = everyone.loc[(everyone["x"] == x) & (everyone["y"] == y)]
        lines.append(f"{y} against {x}: {finding(rows.to_dict('records'))}")
    return lines


def _checks(plan: Plan, tables: Tables) -> pd.DataFrame:
    """Whether the run is complete, and whether its estimates say they are good."""
    states = [item.state for item in plan.specs]
    complete = states.count("done")
    statuses = tables.summary["status"].value_counts().sort_index()
    return pd.DataFrame(
        [
            ("measurements complete", f"{complete} of {len(states)}"),
            ("checkpoints waiting for training", str(len(plan.waiting))),
            ("checkpoints not to be had", str(len(plan.unresolved))),
            ("estimates by status", ", ".join(f"{n} {s}" for s, n in statuses.items())),
        ],
        columns=["check", "result"],
    )


def _provenance(run: Run, plan: Plan, tables: Tables) -> dict[str, object]:
    units = tables.units
    return {
        "run folder": run.store.uri,
        "reduced with": versions(),
        "reduced on": f"{platform.node()} ({platform.machine()}, {platform.system()})",
        "measured with": sorted(set(units["versions"])) if len(units) else [],
        "measured on": sorted(set(units["host"] + " " + units["device"])) if len(units) else [],
        "weights": {
            item.spec.checkpoint: item.spec.ref.identity
            for item in plan.specs
            if item.spec.ref is not None
        },
        "images": sorted({f"{i.spec.data.name}: {i.spec.data_identity}" for i in plan.specs}),
    }
