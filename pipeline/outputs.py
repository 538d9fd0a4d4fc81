"""What a finished launch leaves for readers: figures and report.html in the run folder."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.bounds_figure import bounds_figure
from pipeline.correlate import CorrelationPair
from pipeline.figures import scatter
from pipeline.pair_plot import pair_plot
from pipeline.plan import Plan
from pipeline.reduce import Tables
from pipeline.report import finding, write_report
from pipeline.run import Run
from pipeline.versions import versions

REPORT, FIGURES = "report.html", "figures"


def write_outputs(run: Run, plan: Plan, tables: Tables) -> list[str]:
    """Draw the figures, remove those of pairs that are no more, and write the report.

    Returns:
        Where they are: the report first, then the figures.
    """
    store = run.store
    with tempfile.TemporaryDirectory(prefix="flatcensus-") as folder:
        figures = _drawn(run, tables, Path(folder))
        html = write_report(
            None,
            title=run.manifest.name,
            manifest_toml=run.manifest.text,
            summary=tables.summary,
            correlations=tables.correlations,
            pair_plot=run.manifest.pair_plot,
            matrix=tables.matrix,
            bounds=tables.bounds,
            num_layer_lines=len(tables.layers),
            units=tables.units,
            failures=tables.failures,
            checks=_checks(plan, tables),
            figures=figures,
            provenance=_provenance(run, plan, tables),
        )
        contents = {REPORT: html.encode()}
        contents |= {f"{FIGURES}/{figure.name}": figure.read_bytes() for figure in figures}
    for key, content in contents.items():
        store.put(key, content)
    for key in store.list(f"{FIGURES}/"):
        if "_against_" in key and key not in contents:
            store.delete(key)  # of a pair that left the manifest: nothing would say how old it is
    return [f"{store.uri}/{key}" for key in contents]


def _drawn(run: Run, tables: Tables, folder: Path) -> list[Path]:
    """All figures of a run, as files in a folder."""
    figures: list[Path] = []
    for pair in run.manifest.correlations:
        stem = folder / _named(pair)
        figures += scatter(tables.summary, pair, tables.correlations, stem, pdf=True)
    stem = folder / "pair_plot"
    if run.manifest.pair_plot:
        figures += pair_plot(tables.summary, run.manifest.pair_plot, tables.matrix, stem, pdf=True)
    figures += bounds_figure(tables.bounds, stem.with_name("bounds"), pdf=True)
    return figures


def _named(pair: CorrelationPair) -> str:
    """File name of a pair's figure; scales are named where they are not logarithmic."""
    y, x = (
        series if transform == "log" else f"{series}-{transform}"
        for series, transform in ((pair.y, pair.transform_y), (pair.x, pair.transform_x))
    )
    return f"{y}_against_{x}"


def headline(tables: Tables) -> list[str]:
    """One sentence per pair: coefficients, intervals, counts."""
    everyone: pd.DataFrame = tables.correlations.loc[tables.correlations["group"] == "all"]
    keys = ["x", "y", "transform_x", "transform_y"]
    pairs: dict[tuple[str, ...], list[Mapping[Hashable, Any]]] = {}
    for row in everyone.to_dict("records"):
        pairs.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [f"{y} against {x}: {finding(rows)}" for (x, y, *_), rows in pairs.items()]


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
        "images": sorted(
            {
                f"{item.spec.data.name}: {identity}"
                for item in plan.specs
                for identity in (item.spec.data_identity, item.spec.training_identity)
                if identity is not None
            }
        ),
    }
