"""The correlation matrix as one figure, as in the paper's Figure G.6.

Lower triangle: Pearson's r with its interval and n, on a diverging colour scale. Upper triangle:
the checkpoints of each pair, in the colours and markers of the scatters. Diagonal: name, histogram
and range of each quantity. Sign and size stand in the cells as numbers, so that nothing is lost in
grey. The same tables give the same bytes.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.correlate import paired_points
from pipeline.figures import (
    DPI,
    OTHER_COLOR,
    OTHER_MARKER,
    Style,
    family_styles,
    house_style,
    legend_text,
    save,
)
from pipeline.labels import definition, number, signed
from pipeline.matrix import (
    PairPlot,
    SeriesValues,
    cell_reason,
    matrix_pairs,
    series_values,
    unscaled,
)
from pipeline.naming import drawable
from tasks.correlation import transformed

Color = tuple[float, float, float]

# Ends of the scale: ColorBrewer's RdBu, safe for the colour-blind; white is 0. Both ends are about
# equally dark, so that in grey the shade is |r|.
POSITIVE: Color = (0x21 / 255, 0x66 / 255, 0xAC / 255)
NEGATIVE: Color = (0xB2 / 255, 0x18 / 255, 0x2B / 255)
CELL = 1.0  # inches
LEGEND_WIDTH = 1.9
MARGIN = 0.12
NUM_BINS = 10
MAX_NAME_LINES = 3
NAME_CHARACTERS = 14  # that fit into a cell

_NOTE = (
    "Below the diagonal: Pearson r of the values on their scales, 95 % interval for error-free "
    "values, number of checkpoints. Above: the checkpoints, column to the right and row upwards. "
    "Diagonal: histogram and range."
)


def pair_plot(
    summary: pd.DataFrame, plot: PairPlot, matrix: pd.DataFrame, out: Path, *, pdf: bool = False
) -> list[Path]:
    """Draw the matrix of a summary.

    Args:
        summary: As in ``correlation_table``.
        plot: Its series, in order.
        matrix: The table of ``matrix_table`` for both.
        out: Path without suffix.
        pdf: Also write a PDF.

    Returns:
        The files written: SVG, PNG (200 dpi) and, if asked for, PDF.
    """
    columns = series_values(summary, plot)
    with house_style():
        figure, axes, legend_axes = _canvas(len(columns), _num_families(summary, plot))
        for index, column in enumerate(columns):
            _draw_diagonal(axes, index, column)
        _draw_coefficients(axes, [c.series for c in columns], matrix)
        styles, counts = _draw_points(axes, summary, plot)
        _draw_legend(legend_axes, styles, counts)
        return save(figure, out, pdf=pdf)


def shade(r: float) -> Color:
    """Background of a coefficient: white at 0, blue towards +1, red towards −1."""
    end = POSITIVE if r > 0 else NEGATIVE
    red, green, blue = (1 + abs(r) * (c - 1) for c in end)
    return red, green, blue


def ink(background: Color) -> str:
    """Black or white, whichever is easier to read on a background (WCAG contrast at least 4.5)."""
    return "black" if luminance(background) > 0.179 else "white"


def luminance(color: Color) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _canvas(num_series: int, num_families: int) -> tuple[Figure, Axes, Axes]:
    """A figure whose main axes count cells: x to the right and y down, from 0 to ``num_series``."""
    side = CELL * num_series
    width = side + LEGEND_WIDTH + 3 * MARGIN
    characters = int((width - 2 * MARGIN) * 72 / (6.5 * 0.54))
    note = textwrap.wrap(_NOTE, characters)
    below = 0.13 * len(note) + 0.1
    height = max(side, 0.17 * min(num_families, 17) + 0.5) + below + 2 * MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    top = 1 - MARGIN / height
    axes = figure.add_axes((MARGIN / width, top - side / height, side / width, side / height))
    axes.set(xlim=(0, num_series), ylim=(num_series, 0))
    axes.set_axis_off()
    left = (side + 2 * MARGIN) / width
    legend_axes = figure.add_axes((left, top - 0.5 / height, LEGEND_WIDTH / width, 0.5 / height))
    legend_axes.set_axis_off()
    figure.text(MARGIN / width, MARGIN / height, "\n".join(note), fontsize=6.5, color="#555555")
    return figure, axes, legend_axes


def _num_families(summary: pd.DataFrame, plot: PairPlot) -> int:
    drawn = summary["series"].isin(list(plot.series or ()))
    return summary.loc[drawn, "family"].fillna("").nunique()


def _draw_diagonal(axes: Axes, index: int, column: SeriesValues) -> None:
    _frame(axes, index, index, "#F4F5F7")
    middle = index + 0.5
    name = textwrap.wrap(drawable(definition(column.series).title), NAME_CHARACTERS)
    if len(name) > MAX_NAME_LINES:
        name = [*name[: MAX_NAME_LINES - 1], f"{name[MAX_NAME_LINES - 1][:-1]}…"]
    _write(axes, middle, index + 0.05, "\n".join(name), size=6.8, va="top", color="black")
    if column.gaps:
        _write(axes, middle, index + 0.96, column.gaps, size=5.0, color="#444444")
    values = column.values
    if column.is_constant or not values.size:
        if column.is_constant:
            text = f"constant: {number(float(unscaled(values, column.transform)[0]), 3)}"
        else:
            text = "no values"
        _write(axes, middle, index + 0.7, text, size=6, color="#444444")
    else:
        counts, edges = np.histogram(values, NUM_BINS)
        left = index + 0.1 + 0.8 * (edges[:-1] - edges[0]) / (edges[-1] - edges[0])
        tall = 0.3 * counts / counts.max()
        axes.bar(left, -tall, 0.8 / NUM_BINS, bottom=index + 0.8, align="edge", color="#8C9199",
                 edgecolor="#F4F5F7", linewidth=0.4)  # fmt: skip
        low, high = (number(float(v), 2) for v in unscaled(values[[0, -1]], column.transform))
        scale = {"log": "log, ", "sqrt": "√, ", "identity": ""}[column.transform]
        _write(axes, middle, index + 0.87, f"{scale}{low} to {high}", size=5.4, color="#444444")


def _draw_coefficients(axes: Axes, series: Sequence[str], matrix: pd.DataFrame) -> None:
    place = {name: index for index, name in enumerate(series)}
    chosen = (matrix["group"] == "all") & (matrix["method"] == "pearson")
    for row in matrix.loc[chosen, :].to_dict("records"):
        _draw_coefficient(axes, place[row["y"]], place[row["x"]], row)


def _draw_coefficient(axes: Axes, i: int, j: int, row: Mapping[Hashable, Any]) -> None:
    """Write the cell in row i and column j."""
    r = row["r"]
    missing = f", {row['n_missing']} missing" if row["n_missing"] else ""
    count = f"n = {row['n']}{missing}"
    if np.isnan(r):
        _frame(axes, i, j, "white", hatch="////")
        _write(axes, j + 0.5, i + 0.4, cell_reason(row), size=7, color="#444444", plate=True)
        _write(axes, j + 0.5, i + 0.75, count, size=5.6, color="#444444", plate=True)
        return
    color = ink(shade(r))
    _frame(axes, i, j, shade(r))
    _write(axes, j + 0.5, i + 0.33, signed(r), size=12, color=color)
    interval = (
        "no interval"
        if np.isnan(row["ci_low"])
        else f"[{signed(row['ci_low'])}, {signed(row['ci_high'])}]"
    )
    _write(axes, j + 0.5, i + 0.62, interval, size=6.2, color=color)
    _write(axes, j + 0.5, i + 0.82, count, size=5.6, color=color)


def _draw_points(
    axes: Axes, summary: pd.DataFrame, plot: PairPlot
) -> tuple[dict[str, Style], Counter[str]]:
    """Scatter every pair in its cell above the diagonal. Returns the families' looks and sizes."""
    place = {name: index for index, name in enumerate(plot.series or ())}
    parts = []
    for pair in matrix_pairs(summary, plot):
        _frame(axes, place[pair.x], place[pair.y], "white")
        points = paired_points(summary, pair)
        points = points.loc[points["usable"], :]
        # The cell mirrors that below the diagonal: y is its column there, and to the right here.
        across, _ = transformed(points["y"], points["y_stderr"], pair.transform_y)
        up, _ = transformed(points["x"], points["x_stderr"], pair.transform_x)
        cell = points[["checkpoint", "family"]].copy()
        cell["x"] = place[pair.y] + _inside(across)
        cell["y"] = place[pair.x] + 1 - _inside(up)
        parts.append(cell)
    drawn = pd.concat(parts) if parts else pd.DataFrame(columns=["checkpoint", "family", "x", "y"])
    families = drawn.drop_duplicates("checkpoint").sort_values("checkpoint")["family"].to_list()
    styles = family_styles(families)
    size = 9 if len(families) <= 60 else 4  # chosen: points² of a marker
    for name, style in styles.items():
        rows = drawn[drawn["family"] == name]
        axes.scatter(rows["x"], rows["y"], s=size, color=style.color, marker=style.marker,
                     edgecolors="none", alpha=0.85, zorder=3 if style.named else 2)  # fmt: skip
    return styles, Counter(families)


def _inside(values: np.ndarray) -> np.ndarray:
    """Values (n,) as positions within a cell, in the middle if they are equal."""
    if not values.size or np.ptp(values) == 0:
        return np.full(values.size, 0.5)
    return 0.08 + 0.84 * (values - values.min()) / np.ptp(values)


def _draw_legend(axes: Axes, styles: Mapping[str, Style], counts: Counter[str]) -> None:
    bar = np.linspace(-1, 1, 201)
    axes.imshow([[shade(r) for r in bar]], extent=(0.05, 0.75, 0.55, 0.85), aspect="auto")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for position, text in ((0.05, "−1"), (0.4, "0"), (0.75, "+1")):
        axes.text(position, 0.4, text, ha="center", va="top", fontsize=6.5)
    axes.text(0.79, 0.7, "Pearson r", va="center", fontsize=6.5)
    others = [name for name, style in styles.items() if not style.named]
    looks = [(s.color, s.marker, legend_text(n, counts[n])) for n, s in styles.items() if s.named]
    if others:
        total = sum(counts[name] for name in others)
        looks.append((OTHER_COLOR, OTHER_MARKER, f"other: {len(others)} families ({total})"))
    for color, marker, text in looks:
        axes.scatter([], [], s=22, color=color, marker=marker, edgecolors="none", label=text)
    if looks:
        legend = axes.legend(loc="upper left", bbox_to_anchor=(0, 0.05), borderaxespad=0,
                             handletextpad=0.3, labelspacing=0.45)  # fmt: skip
        for entry in legend.get_texts():
            entry.set_parse_math(False)


def _frame(axes: Axes, i: int, j: int, color: str | Color, *, hatch: str = "") -> None:
    axes.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor="#C9CDD3", linewidth=0.5,
                             hatch=hatch, zorder=0))  # fmt: skip


def _write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    color: str,
    va: str = "center",
    plate: bool = False,
) -> None:
    """Centred text at a place in cells; a white plate keeps it readable on hatching."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0} if plate else None
    axes.text(x, y, text, ha="center", va=va, fontsize=size, color=color, linespacing=1.1,
              parse_math=False, zorder=4, bbox=box)  # fmt: skip
