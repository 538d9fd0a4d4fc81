"""Geometry of the report's interactive scatter: positions in pixels, ticks, texts, no markup.

The template turns it into inline SVG and escapes every text. The picture is that of
``pipeline.figures`` with a hover text per point.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pipeline.correlate import CorrelationPair, paired_points
from pipeline.figures import COLORS, MARKERS, family_styles
from pipeline.labels import axis_label, number
from tasks.correlation import Transform, transformed

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 96, 16, 14, 66

# Outlines of matplotlib's markers of the same names, within ± 5 pixels.
_SHAPES = {
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z", "s": "M-4-4h8v8h-8z",
    "^": "M0-5L4.8 4h-9.6z", "D": "M0-5.4L5.4 0L0 5.4L-5.4 0z", "v": "M0 5L4.8-4h-9.6z",
    "P": "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "X": "M-4.6-2.3L-2.3-4.6L0-2.3L2.3-4.6L4.6-2.3L2.3 0L4.6 2.3L2.3 4.6L0 2.3"
         "L-2.3 4.6L-4.6 2.3L-2.3 0z",
    "<": "M-5 0L4-4.8v9.6z", ">": "M5 0L-4-4.8v9.6z", ".": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
}  # fmt: skip


class Tick(NamedTuple):
    """Position in pixels and text of a tick."""

    at: float
    text: str


class Point(NamedTuple):
    """A drawn checkpoint: where, how, its error bars' ends in pixels, and its hover text."""

    x: float
    y: float
    x_bar: tuple[float, float]
    y_bar: tuple[float, float]
    color: str
    shape: str
    family: int
    title: str


class LegendEntry(NamedTuple):
    """A family (or all small ones together, where there are too many) in the legend."""

    family: int
    text: str
    color: str
    shape: str


class Plot(NamedTuple):
    """Everything the template needs to draw one scatter."""

    x_label: list[str]
    y_label: list[str]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[Point]
    legend: list[LegendEntry]
    num_planned: int


class _Scale(NamedTuple):
    """Linear map from the transformed scale to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)


def scatter_plot(summary: pd.DataFrame, pair: CorrelationPair) -> Plot:
    """Lay out the usable checkpoints of a pair."""
    points = paired_points(summary, pair)
    usable = points.loc[points["usable"], :]
    families = usable["family"].to_list()
    looks, legend = _families(families)
    drawn, x_ticks, y_ticks = [], [], []
    if len(usable):
        x, x_ends = _coordinates(usable, "x", pair.transform_x)
        y, y_ends = _coordinates(usable, "y", pair.transform_y)
        x_scale = _Scale(*_limits(x), LEFT, WIDTH - RIGHT)
        y_scale = _Scale(*_limits(y), HEIGHT - BOTTOM, TOP)
        x_ticks = _ticks(x_scale, pair.transform_x)
        y_ticks = _ticks(y_scale, pair.transform_y)
        for i, row in enumerate(usable.to_dict("records")):
            family, color, shape = looks[families[i]]
            drawn.append(
                Point(
                    x_scale(x[i]),
                    y_scale(y[i]),
                    (_held(x_scale, x_ends[0, i]), _held(x_scale, x_ends[1, i])),
                    (_held(y_scale, y_ends[0, i]), _held(y_scale, y_ends[1, i])),
                    color,
                    shape,
                    family,
                    _title(row, pair),
                )
            )
    return Plot(
        axis_label(pair.x, pair.transform_x).split("\n"),
        axis_label(pair.y, pair.transform_y).split("\n"),
        x_ticks,
        y_ticks,
        drawn,
        legend,
        len(points),
    )


def _families(
    families: list[str],
) -> tuple[dict[str, tuple[int, str, str]], list[LegendEntry]]:
    """Legend number, CSS class and outline per family, and the legend."""
    looks, legend = {}, []
    styles = family_styles(families)
    folded = [name for name, style in styles.items() if not style.named]
    for index, (name, style) in enumerate(styles.items()):
        if style.named:
            color = f"c{COLORS.index(style.color)}"
            looks[name] = (index, color, _SHAPES[MARKERS[index % len(MARKERS)]])
            text = f"{name or 'no family'} ({families.count(name)})"
            legend.append(LegendEntry(index, text, color, looks[name][2]))
        else:
            looks[name] = (len(styles) - len(folded), "other", _SHAPES["."])
    if folded:
        count = sum(families.count(name) for name in folded)
        text = f"other: {len(folded)} families ({count})"
        legend.append(LegendEntry(len(styles) - len(folded), text, "other", _SHAPES["."]))
    return looks, legend


def _coordinates(
    points: pd.DataFrame, axis: str, transform: Transform
) -> tuple[np.ndarray, np.ndarray]:
    """Values (n,) and ends of ± 1 standard error (2, n) on the transformed scale."""
    raw = points[axis].to_numpy()
    stderr = np.nan_to_num(points[f"{axis}_stderr"].to_numpy(), posinf=0.0)
    values, _ = transformed(raw, stderr, transform)
    if transform == "sqrt":
        return values, np.sqrt(np.maximum(np.stack([raw - stderr, raw + stderr]), 0))
    ends = np.stack([raw - stderr, raw + stderr])
    if transform == "log":
        tiny = float(raw.min()) * 1e-6  # below the axis: the bar runs off the plot
        ends = np.log(np.maximum(ends, tiny))
    return values, ends


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(scale: _Scale, transform: Transform) -> list[Tick]:
    """About six ticks: 1-2-5 steps, or powers of ten where the axis spans several."""
    if transform == "log" and scale.high - scale.low > math.log(4):
        first = max(math.floor(scale.low / math.log(10)), -307)  # what a float64 can hold
        decades = range(first, min(math.ceil(scale.high / math.log(10)), 307) + 1)
        many = scale.high - scale.low > 2.5 * math.log(10)
        step = max(1, math.ceil(len(decades) / 8))
        raw = [m * 10.0**d for d in decades[::step] for m in ((1,) if many else (1, 2, 5))]
        return [
            Tick(scale(math.log(v)), number(v))
            for v in raw
            if v > 0 and scale.low <= math.log(v) <= scale.high
        ]
    low, high = (math.exp(scale.low), math.exp(scale.high)) if transform == "log" else scale[:2]
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    raw = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [Tick(scale(math.log(v) if transform == "log" else v), number(v)) for v in raw]


def _held(scale: _Scale, value: float) -> float:
    low, high = sorted((scale.start, scale.stop))
    return min(max(scale(value), low), high)


def _title(row: Mapping[Hashable, Any], pair: CorrelationPair) -> str:
    lines = [str(row["checkpoint"]), f"family: {row['family'] or 'none'}"]
    for axis, series in (("x", pair.x), ("y", pair.y)):
        lines.append(f"{series} = {number(row[axis])} ± {number(row[f'{axis}_stderr'], 2)}")
    return "\n".join(lines)
