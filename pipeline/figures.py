"""Scatter of one series against another over checkpoints, as in the paper's Figure 4.

Families differ by colour and marker, both axes carry standard errors, checkpoints far from the
robust log-log line are named. The same tables give the same bytes: no dates, no random ids, no
settings of the user's matplotlib.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    ScalarFormatter,
)

from pipeline.correlate import CorrelationPair, paired_points
from pipeline.labels import axis_label, correlation_text, counted
from pipeline.naming import drawable, name_points, shortened
from tasks.correlation import Transform, robust_line, transformed

# Okabe & Ito's colours without yellow (too pale on white) and nine markers: 7 and 9 have no common
# factor, so 63 families differ in at least one of the two before the cycle repeats.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
OTHER_COLOR, OTHER_MARKER = "#9A9A9A", "."
MAX_LEGEND = 24  # chosen: entries that fit beside the axes, and timm has 21 families of ViTs
OUTLIER_DEVIATIONS = 2.5  # robust standard deviations off the line
MAX_NAMED = 12
MIN_FOR_LINE = 5
DPI = 200

_STYLE = {
    "svg.hashsalt": "flatcensus", "pdf.fonttype": 42, "font.family": "DejaVu Sans",
    "font.size": 8.5, "axes.titlesize": 10, "axes.labelsize": 9, "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 7.5, "axes.axisbelow": True, "axes.unicode_minus": True,
}  # fmt: skip


class Style(NamedTuple):
    """How a family is drawn, and whether the legend names it."""

    color: str
    marker: str
    named: bool


def scatter(
    summary: pd.DataFrame,
    pair: CorrelationPair,
    correlations: pd.DataFrame,
    out: Path,
    *,
    pdf: bool = False,
) -> list[Path]:
    """Draw one pair over all checkpoints of a summary.

    Args:
        summary: As in ``correlation_table``.
        pair: Series and scales of the two axes.
        correlations: The table of ``correlation_table``; its rows of this pair are quoted.
        out: Path without suffix; suffixes are appended, so names may contain dots.
        pdf: Also write a PDF.

    Returns:
        The files written: SVG, PNG (200 dpi) and, if asked for, PDF.
    """
    points = paired_points(summary, pair)
    with house_style():
        return save(_figure(points, pair, correlations), out, pdf=pdf)


def save(figure: Figure, out: Path, *, pdf: bool) -> list[Path]:
    """Write a figure as SVG, PNG and perhaps PDF; call it inside ``house_style``."""
    # No date and no version: equal tables give equal bytes.
    metadata = {
        "svg": {"Date": None, "Creator": None},
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    paths = []
    for kind in ("svg", "png", "pdf") if pdf else ("svg", "png"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata[kind])
        paths.append(out.with_name(f"{out.name}.{kind}"))
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def house_style() -> AbstractContextManager[None]:
    """Settings of all figures, whatever the user's are."""
    return matplotlib.style.context(["default", _STYLE])


def family_styles(families: Sequence[str]) -> dict[str, Style]:
    """Colour and marker per family, the largest first; small ones share one when there are many."""
    counts = Counter(families)
    order = sorted(counts, key=lambda name: (-counts[name], name))
    shown = order if len(order) <= MAX_LEGEND else order[: MAX_LEGEND - 1]
    styles = {
        name: Style(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], True)
        for i, name in enumerate(shown)
    }
    return styles | {name: Style(OTHER_COLOR, OTHER_MARKER, False) for name in order[len(shown) :]}


def outliers(points: pd.DataFrame, pair: CorrelationPair) -> pd.DataFrame:
    """Usable points far from the robust line on the transformed scales, farthest first."""
    usable, slope_intercept, deviations = _line(points, pair)
    if slope_intercept is None:
        return usable.iloc[:0]
    order = np.argsort(-np.abs(deviations), kind="stable")
    return usable.iloc[order[np.abs(deviations)[order] > OUTLIER_DEVIATIONS]]


def _figure(points: pd.DataFrame, pair: CorrelationPair, correlations: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7.2, 5.0), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    usable = points.loc[points["usable"], :]
    axes.set_xlabel(drawable(axis_label(pair.x, pair.transform_x)), parse_math=False)
    axes.set_ylabel(drawable(axis_label(pair.y, pair.transform_y)), parse_math=False)
    axes.grid(True, which="major", color="#E4E4E4", linewidth=0.6)
    if len(usable):
        _draw_points(axes, usable, pair)
        _draw_line(axes, points, pair)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "No checkpoint has both values yet", ha="center", color="#555555",
                  transform=axes.transAxes)  # fmt: skip
    heading = _heading(points, pair, correlations)
    axes.set_title(drawable(heading), loc="left", parse_math=False, fontsize=8.5, pad=8)
    note = figure.supxlabel("", x=0.01, ha="left", fontsize=6.5, color="#555555")
    note.set_parse_math(False)
    far = outliers(points, pair)
    note.set_text(drawable(_note(points, pair, len(far))))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # names are placed in final coordinates
    x, _ = _axis(usable, "x", pair.transform_x)
    y, _ = _axis(usable, "y", pair.transform_y)
    rows = usable.index.get_indexer(far.index[:MAX_NAMED])
    name_points(axes, x, y, dict(zip(rows, far["checkpoint"], strict=False)))
    return figure


def _draw_points(axes: Axes, usable: pd.DataFrame, pair: CorrelationPair) -> None:
    styles = family_styles(usable["family"].to_list())
    x, x_bars = _axis(usable, "x", pair.transform_x)
    y, y_bars = _axis(usable, "y", pair.transform_y)
    _set_scale(axes.xaxis, axes.set_xscale, axes.set_xlim, x, pair.transform_x)
    _set_scale(axes.yaxis, axes.set_yscale, axes.set_ylim, y, pair.transform_y)
    axes.errorbar(x, y, xerr=x_bars, yerr=y_bars, fmt="none", ecolor="#8A8A8A", elinewidth=0.6,
                  alpha=0.7, zorder=1)  # fmt: skip
    family = usable["family"].to_numpy()
    others = {name for name, style in styles.items() if not style.named}
    for name, style in styles.items():
        if not style.named:
            continue
        rows = family == name
        axes.scatter(x[rows], y[rows], s=24, color=style.color, marker=style.marker, alpha=0.9,
                     edgecolors="white", linewidths=0.4, zorder=3,
                     label=legend_text(name, int(rows.sum())))  # fmt: skip
    if others:
        rows = np.isin(family, list(others))
        axes.scatter(x[rows], y[rows], s=26, color=OTHER_COLOR, marker=OTHER_MARKER, zorder=2,
                     label=f"other: {len(others)} families ({rows.sum()})")  # fmt: skip
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0,
                         handletextpad=0.3, labelspacing=0.45)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _set_scale(
    axis: Axis,
    set_scale: Callable[..., None],
    set_limits: Callable[..., object],
    values: np.ndarray,
    transform: str,
) -> None:
    """Scale, limits and ticks from the points: no error bar can squeeze them into a corner."""
    log = transform == "log"
    set_scale("log" if log else "linear")
    v = np.log(values) if log else values
    low, high = float(v.min()), float(v.max())
    margin = 0.08 * (high - low) or (0.5 if log else 0.1 * abs(high) or 1.0)
    ends = np.array([low - margin, high + margin])
    set_limits(*(np.exp(ends) if log else ends))
    decades = float(np.ptp(ends)) / np.log(10) if log else np.inf
    if decades < 0.5:
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(ScalarFormatter())
    elif decades < 2:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False))
    axis.set_minor_formatter(NullFormatter())


def _draw_line(axes: Axes, points: pd.DataFrame, pair: CorrelationPair) -> None:
    usable, slope_intercept, _ = _line(points, pair)
    if slope_intercept is None:
        return
    slope, intercept = slope_intercept
    x, _ = transformed(usable["x"], usable["x_stderr"], pair.transform_x)
    ends = np.array([x.min(), x.max()])
    fitted = slope * ends + intercept
    axes.plot(np.exp(ends) if pair.transform_x == "log" else ends,
              np.exp(fitted) if pair.transform_y == "log" else fitted,
              color="#777777", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)  # fmt: skip


def _line(
    points: pd.DataFrame, pair: CorrelationPair
) -> tuple[pd.DataFrame, tuple[float, float] | None, np.ndarray]:
    usable = points.loc[points["usable"], :]
    x, _ = transformed(usable["x"], usable["x_stderr"], pair.transform_x)
    y, _ = transformed(usable["y"], usable["y_stderr"], pair.transform_y)
    if len(usable) < MIN_FOR_LINE or np.ptp(x) == 0:
        return usable, None, np.zeros(len(usable))
    slope, intercept, deviations = robust_line(x, y)
    return usable, (slope, intercept), deviations


def _axis(points: pd.DataFrame, axis: str, transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n,) and half lengths of the error bars (n,); √ is drawn on a linear axis."""
    if transform == "sqrt":
        values, bars = transformed(points[axis], points[f"{axis}_stderr"], "sqrt")
    else:
        values, bars = points[axis].to_numpy(), points[f"{axis}_stderr"].to_numpy()
    return values, np.where(np.isfinite(bars), bars, 0.0)


def legend_text(family: str, count: int) -> str:
    """Name of a family and how many checkpoints it has, as every legend writes it."""
    # A thin space in front: matplotlib hides legend entries that start with an underscore.
    return drawable(f"\u2009{shortened(family) or 'no family'} ({count})")


def _heading(points: pd.DataFrame, pair: CorrelationPair, correlations: pd.DataFrame) -> str:
    chosen = (correlations["group"] == "all") & correlations["method"].isin(["pearson", "spearman"])
    for field in ("x", "y", "transform_x", "transform_y"):
        chosen &= correlations[field] == getattr(pair, field)
    quoted = [correlation_text(row) for row in correlations.loc[chosen, :].to_dict("records")]
    count = int(points["usable"].to_numpy().sum())
    counts = f"n = {count}, {len(points) - count} missing"
    return "\n".join([*([" · ".join(quoted)] if quoted else []), counts])


def _note(points: pd.DataFrame, pair: CorrelationPair, num_far: int) -> str:
    notes = ["Bars: ± 1 standard error."]
    if _line(points, pair)[1] is not None:
        notes.append("Dashed: Theil–Sen line.")
    notes.append(_scale_note(pair))
    for axis, transform in _axes(pair):
        values = points[axis].to_numpy()
        on_scale, _ = transformed(values, np.zeros_like(values), transform)
        outside = np.isfinite(values) & ~np.isfinite(on_scale)
        if outside.any():
            limit = "not positive" if transform == "log" else "negative"
            notes.append(f"{counted(int(outside.sum()), 'checkpoint')} not drawn: {axis} {limit}.")
    if num_far > MAX_NAMED:
        notes.append(f"{MAX_NAMED} of {num_far} outliers named.")
    return "  ".join(notes)


def _axes(pair: CorrelationPair) -> tuple[tuple[str, Transform], tuple[str, Transform]]:
    return ("x", pair.transform_x), ("y", pair.transform_y)


def _scale_note(pair: CorrelationPair) -> str:
    scales = {"log": "logarithms", "sqrt": "square roots", "identity": "values"}
    x, y = scales[pair.transform_x], scales[pair.transform_y]
    return f"Pearson of {x}." if x == y else f"Pearson of {x} (x) and {y} (y)."
