"""One self-contained HTML report of a run: headline, scatter, tables, failures, cost, provenance.

Works offline and without scripts (they only sort, filter and highlight). Every name that comes
from a manifest, a hub or an exception is escaped. The text depends on the arguments alone.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from pipeline.bounds_figure import bound_name
from pipeline.bounds_summary import bounds_headline, num_violated, standing, summarize_bounds
from pipeline.correlate import CorrelationPair
from pipeline.labels import coefficient, correlation_text, counted, definition, number
from pipeline.matrix import PairPlot
from pipeline.matrix_view import matrix_view
from pipeline.plot import HEIGHT, LEFT, WIDTH, Plot, scatter_plot
from pipeline.twins import compare_twins

_OWN_PLACE = ("pair_plot.svg", "bounds.svg")
_Records = Sequence[Mapping[Hashable, Any]]


class Panel(NamedTuple):
    """One pair: its sentences, plot and rows of the correlation table."""

    title: str
    everyone: str
    within: str
    plot: Plot


def write_report(
    path: Path | None,
    *,
    title: str,
    manifest_toml: str,
    summary: pd.DataFrame,
    correlations: pd.DataFrame,
    pair_plot: PairPlot | None,
    matrix: pd.DataFrame,
    bounds: pd.DataFrame,
    num_layer_lines: int,
    units: pd.DataFrame,
    failures: pd.DataFrame,
    checks: pd.DataFrame,
    figures: Sequence[Path],
    provenance: Mapping[str, Any],
) -> str:
    """Build the report and write it to ``path`` unless that is None.

    Args:
        path: The HTML file, replaced.
        title: Heading, usually the run's name.
        manifest_toml: The manifest as text.
        summary: One row per (checkpoint, series), planned ones included.
        correlations: The table of ``correlation_table`` for this summary.
        pair_plot: The manifest's, or None.
        matrix: The table of ``matrix_table`` for both.
        bounds: The ``bounds`` table; may be empty.
        num_layer_lines: Lines of the ``layers`` table, which the report only mentions.
        units: One row per unit (``metric``, ``label``, ``status``, ``seconds``, ``num_rows``,
            ``peak_bytes``, ``device``, ``host``); may be empty.
        failures: Failed units (``checkpoint``, ``metric``, ``failure_type``, ``failure_message``,
            ``failure_hint``, ``failure_traceback``, ...); may be empty.
        checks: Further checks, shown as they are, such as (check, result); may be empty.
        figures: Figure files; SVG are embedded, others are left out. ``pair_plot.svg`` and
            ``bounds.svg`` go into their sections, the rest to the figures for print.
        provenance: Versions, weights identities, machine; nested mappings and lists are fine.

    Returns:
        The HTML text.
    """
    records = summary.assign(family=summary["family"].fillna("")).to_dict("records")
    lacking = [row for row in records if not math.isfinite(row["value"])]
    embedded = {f.name: _embedded(f) for f in figures if f.suffix == ".svg"}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "coefficient": coefficient}
    html = environment.get_template("report.html.j2").render(
        title=title,
        panels=_panels(summary, correlations),
        counts=_counts(records, lacking),
        correlations=_correlation_rows(correlations),
        matrix=matrix_view(summary, pair_plot, matrix) if pair_plot else [],
        bounds=_bound_rows(bounds),
        bounds_sentence=bounds_headline(bounds),
        num_violated=num_violated(bounds),
        num_layer_lines=num_layer_lines,
        definitions=_definitions(records),
        summary=records,
        twins=compare_twins(summary).to_dict("records"),
        missing=_missing(lacking),
        failures=[_texts(row) for row in failures.to_dict("records")],
        units=_unit_groups(units.to_dict("records")),
        forward_equivalents=math.fsum(row["forward_equivalents"] for row in records),
        checks=checks,
        figures=[value for value in embedded.values() if value[0] not in _OWN_PLACE],
        matrix_figure=embedded.get("pair_plot.svg"),
        bounds_figure=embedded.get("bounds.svg"),
        manifest_toml=manifest_toml,
        provenance={key: _plain(value) for key, value in provenance.items()},
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
    )
    # Names may hold what HTML and UTF-8 cannot: control characters and lone surrogates.
    html = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", html)
    if path is not None:
        path.write_text(html, encoding="utf-8", newline="\n")
    return html


def finding(rows: _Records) -> str:
    """The result of a pair in one group: coefficients, intervals, n and what is missing."""
    n, missing = int(rows[0]["n"]), int(rows[0]["n_missing"])
    found = ", ".join(correlation_text(row) for row in rows)
    reasons = sorted({str(row["reason"]) for row in rows if row["reason"]})
    absent = f"{counted(missing, 'planned checkpoint')} missing" if missing else "none missing"
    end = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{found}, over {counted(n, 'checkpoint')}, {absent}{end}."


def _panels(summary: pd.DataFrame, correlations: pd.DataFrame) -> list[Panel]:
    keys = ("x", "y", "transform_x", "transform_y")
    groups = defaultdict(lambda: defaultdict(list))
    for row in correlations.to_dict("records"):
        groups[tuple(row[key] for key in keys)][row["group"]].append(row)
    panels = []
    for values, rows in groups.items():
        pair = CorrelationPair.model_validate(dict(zip(keys, values, strict=True)))
        x, y = (
            definition(series).title + {"log": " (log)", "sqrt": " (√)", "identity": ""}[transform]
            for series, transform in ((pair.x, pair.transform_x), (pair.y, pair.transform_y))
        )
        findings = finding(rows["all"]), finding(rows["within"])
        panels.append(Panel(f"{y} against {x}", *findings, scatter_plot(summary, pair)))
    return panels


def _counts(records: _Records, lacking: _Records) -> dict[str, int]:
    planned = {row["checkpoint"] for row in records}
    return {
        "planned": len(planned),
        "complete": len(planned - {row["checkpoint"] for row in lacking}),
        "lacking": len({row["checkpoint"] for row in lacking}),
        "families": len({row["family"] for row in records}),
        "series": len({row["series"] for row in records}),
    }


def _correlation_rows(correlations: pd.DataFrame) -> list[dict[Any, Any]]:
    rows = correlations.to_dict("records")
    for row in rows:
        for axis in ("x", "y"):
            scale = row[f"transform_{axis}"]
            row[axis] = row[axis] if scale == "identity" else f"{scale} {row[axis]}"
    return rows


def _bound_rows(bounds: pd.DataFrame) -> list[dict[Any, Any]]:
    """The summary of the bounds with each one's name and what its form is."""
    rows = summarize_bounds(bounds).to_dict("records")
    return [
        row | {
            "name": bound_name(row["bound"], row["kind"]),
            "form": standing(
                row["is_theorem"], row["num_conditions_unmet"] < row["num_checks"]
            ),
        }
        for row in rows
    ]  # fmt: skip


def _definitions(records: _Records) -> list[tuple[str, str, str]]:
    """Series, what it is, and its unit, for those that have a written definition."""
    found = [(name, definition(name)) for name in sorted({row["series"] for row in records})]
    return [(series, d.formula, d.unit) for series, d in found if d.formula]


def _missing(lacking: _Records) -> list[dict[str, Any]]:
    """One line per checkpoint and cause, with the series it lacks."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in lacking:
        key = (str(row["checkpoint"]), str(row["status"]), str(row["status_text"]))
        groups.setdefault(key, []).append(str(row["series"]))
    return [
        {"checkpoint": name, "status": status, "text": text, "series": ", ".join(sorted(series))}
        for (name, status, text), series in sorted(groups.items())
    ]


def _unit_groups(units: _Records) -> list[dict[str, Any]]:
    """Cost per measurement and device."""
    groups: dict[tuple[str, str, str], list[Mapping[Hashable, Any]]] = {}
    for unit in units:
        groups.setdefault((unit["metric"], unit["label"], unit["device"]), []).append(unit)
    return [
        {
            "metric": metric, "label": label, "device": device,
            "ok": sum(unit["status"] == "ok" for unit in group),
            "failed": sum(unit["status"] != "ok" for unit in group),
            "rows": sum(int(unit["num_rows"]) for unit in group),
            "hosts": len({unit["host"] for unit in group}),
            "seconds": math.fsum(unit["seconds"] for unit in group),
            "peak_gib": max(_float(unit["peak_bytes"]) for unit in group) / 2**30,
        }
        for (metric, label, device), group in sorted(groups.items())
    ]  # fmt: skip


def _float(value: Any) -> float:
    return float("nan") if _is_absent(value) else float(value)


def _texts(row: Mapping[Hashable, Any]) -> dict[str, str]:
    """A failure as text fields; absent ones are empty."""
    names = ("checkpoint", "metric", "label", "failure_class", "failure_type",
             "failure_message", "failure_hint", "failure_traceback")  # fmt: skip
    texts = {name: "" if _is_absent(row.get(name)) else str(row[name]) for name in names}
    # A column with gaps holds whole numbers as floats.
    ends = [f"{int(row[end]):,}" for end in ("start", "stop") if not _is_absent(row.get(end))]
    return texts | {"range": "–".join(ends)}


def _is_absent(value: Any) -> bool:
    return value is None or value is pd.NA or value != value


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _embedded(figure: Path) -> tuple[str, str]:
    """File name and data URI: as an image, a figure can neither run scripts nor load anything."""
    data = base64.b64encode(figure.read_bytes()).decode("ascii")
    return figure.name, f"data:image/svg+xml;base64,{data}"
