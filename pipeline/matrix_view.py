"""Cells of the report's correlation matrix: texts and shades, no markup.

Pearson's r stands below the diagonal, Spearman's ρ above it, each with its value within families.
The template escapes every text.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from pipeline.labels import definition, number, signed
from pipeline.matrix import PairPlot, SeriesValues, cell_reason, series_values, unscaled

_Row = Mapping[Hashable, Any]


class Cell(NamedTuple):
    """One cell: its main text, smaller lines, a hover text, and its shade.

    ``sign`` is ``pos``, ``neg``, ``none`` (no coefficient) or ``self`` (the diagonal), ``percent``
    how much of that colour.
    """

    text: str
    lines: list[str]
    title: str
    sign: str
    percent: int


class MatrixRow(NamedTuple):
    """One series: its name, what it is called, and its cells."""

    series: str
    title: str
    cells: list[Cell]


def matrix_view(summary: pd.DataFrame, plot: PairPlot, matrix: pd.DataFrame) -> list[MatrixRow]:
    """Rows of the matrix in the plot's order; a single series gives one row with one cell."""
    found: dict[tuple[str, ...], _Row] = {
        (row["x"], row["y"], row["method"], row["group"]): row for row in matrix.to_dict("records")
    }
    columns = series_values(summary, plot)
    names = [column.series for column in columns]
    rows = []
    for i, column in enumerate(columns):
        cells = []
        for j in range(len(names)):
            x, y = names[min(i, j)], names[max(i, j)]
            method = "pearson" if j < i else "spearman"
            cells.append(
                _diagonal(column)
                if i == j
                else _pair(*(found[x, y, method, group] for group in ("all", "within")))
            )
        rows.append(MatrixRow(scaled_name(column), definition(column.series).title, cells))
    return rows


def scaled_name(column: SeriesValues) -> str:
    """Series with its scale, as the tables name it."""
    if column.transform == "identity":
        return column.series
    return f"{column.transform} {column.series}"


def _diagonal(column: SeriesValues) -> Cell:
    if not column.values.size:
        return Cell("no values", [column.gaps], column.series, "self", 0)
    low, high = (number(float(v), 3) for v in unscaled(column.values[[0, -1]], column.transform))
    text = f"constant: {low}" if column.is_constant else f"{low} to {high}"
    lines = [f"n {column.values.size}{', ' if column.gaps else ''}{column.gaps}"]
    return Cell(text, lines, column.series, "self", 0)


def _pair(everyone: _Row, within: _Row) -> Cell:
    symbol = "r" if everyone["method"] == "pearson" else "ρ"
    title = f"{everyone['y']} against {everyone['x']}"
    notes = [f"{group}: {row['reason']}" for group, row in (("all", everyone), ("within", within))
             if row["reason"] and row["reason"] != "no interval asked for"]  # fmt: skip
    title = "\n".join([title, *notes])
    missing = f", {everyone['n_missing']} missing" if everyone["n_missing"] else ""
    count = f"n {everyone['n']}{missing}"
    if math.isnan(everyone["r"]):
        return Cell(cell_reason(everyone), [count], title, "none", 0)
    lines = []
    if not math.isnan(everyone["ci_low"]):
        lines.append(f"[{signed(everyone['ci_low'])}, {signed(everyone['ci_high'])}]")
    inside = signed(within["r"]) if not math.isnan(within["r"]) else "–"
    lines += [f"within {inside}", count]
    r = everyone["r"]
    sign = "pos" if r > 0 else "neg"
    return Cell(f"{symbol} {signed(r)}", lines, title, sign, round(100 * abs(r)))
