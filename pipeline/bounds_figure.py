"""How much room every inequality of a run leaves: one strip of checkpoints per bound and form.

The horizontal axis is log10(right / left): zero is equality, points left of it fail. Forms that are
theorems are drawn in full, others hollow. Checks without two positive finite sides have no place on
the axis and are counted beside their strip. The same table gives the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.bounds_summary import MISSING, standing
from pipeline.figures import (
    DPI,
    OTHER_COLOR,
    OTHER_MARKER,
    family_styles,
    house_style,
    legend_text,
    save,
)
from pipeline.naming import drawable, shortened

STRIP = 0.42  # inches per strip
FAIL_COLOR = "#A3261C"

_Line = Mapping[Hashable, Any]


def bounds_figure(bounds: pd.DataFrame, out: Path, *, pdf: bool = False) -> list[Path]:
    """Draw the slack of all evaluated checks of a ``bounds`` table.

    Args:
        bounds: The table; lines without a result are left out.
        out: Path without suffix.
        pdf: Also write a PDF.

    Returns:
        The files written: SVG, PNG (200 dpi) and, if asked for, PDF; none where nothing was
        evaluated.
    """
    lines = [line for line in bounds.to_dict("records") if line["holds"] != MISSING]
    strips: dict[tuple[str, str], list[_Line]] = {}
    for line in lines:
        strips.setdefault((line["bound"], line["kind"]), []).append(line)
    if not strips:
        return []
    with house_style():
        figure = Figure(figsize=(7.2, STRIP * len(strips) + 1.3), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(axes, strips)
        return save(figure, out, pdf=pdf)


def bound_name(bound: str, kind: str) -> str:
    """What a bound and its form are called: the paper's equation and the form."""
    return f"({bound}) {kind}".strip()


def _draw(axes: Axes, strips: Mapping[tuple[str, str], Sequence[_Line]]) -> None:
    axes.axvspan(-1000, 0, color=FAIL_COLOR, alpha=0.06, linewidth=0)
    axes.axvline(0, color=FAIL_COLOR, linewidth=1.0)
    names: list[str] = []
    reach = [0.0]
    places: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for row, ((bound, kind), lines) in enumerate(strips.items()):
        shown = sorted((x for x in lines if np.isfinite(x["slack_log10"])), key=_order)
        names.append(_strip_name(bound, kind, lines, len(lines) - len(shown)))
        for index, line in enumerate(shown):
            # Spread over the strip by rank: neighbours on the axis stand at different heights.
            y = row + 0.28 * (((index * 5) % 7) / 3 - 1)
            is_filled = line["is_theorem"] is True and line["conditions_met"] is True
            look = (line["family"] or "", is_filled)
            places.setdefault(look, []).append((float(line["slack_log10"]), y))
            reach.append(float(line["slack_log10"]))
    _draw_points(axes, places, [line for lines in strips.values() for line in lines])
    low, high = min(reach), max(reach)
    margin = 0.05 * (high - low) or 0.5
    axes.set(xlim=(low - 2 * margin, high + margin), ylim=(len(strips) - 0.4, -0.6))
    axes.set_yticks(range(len(strips)), names, fontsize=7.5)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.grid(True, axis="x", color="#E4E4E4", linewidth=0.6)
    axes.set_xlabel(
        "log10(right side / left side): orders of magnitude to spare; left of 0 the inequality "
        "fails\nFilled: a theorem whose conditions are met. Hollow: may fail.",
        fontsize=7.5,
    )


def _draw_points(
    axes: Axes,
    places: Mapping[tuple[str, bool], Sequence[tuple[float, float]]],
    lines: Sequence[_Line],
) -> None:
    """Draw the points of each family, filled and hollow, and the legend."""
    families = {str(line["checkpoint"]): line["family"] or "" for line in lines}
    counts = Counter(families.values())
    styles = family_styles(list(families.values()))
    for (family, is_filled), points in sorted(places.items()):
        style = styles[family]
        x, y = np.array(points).T
        axes.scatter(x, y, s=15, marker=style.marker, linewidths=0.7, edgecolors=style.color,
                     facecolors=style.color if is_filled else "none", zorder=3)  # fmt: skip
    looks = [(s.color, s.marker, legend_text(n, counts[n])) for n, s in styles.items() if s.named]
    if len(looks) < len(styles):
        total = sum(counts[name] for name, style in styles.items() if not style.named)
        text = f"other: {len(styles) - len(looks)} families ({total})"
        looks.append((OTHER_COLOR, OTHER_MARKER, text))
    for color, marker, text in looks:
        axes.scatter([], [], s=18, color=color, marker=marker, label=text)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0,
                         handletextpad=0.3, labelspacing=0.45)  # fmt: skip
    for entry in legend.get_texts():
        entry.set_parse_math(False)


def _strip_name(bound: str, kind: str, lines: Sequence[_Line], num_hidden: int) -> str:
    is_theorem = any(line["is_theorem"] is True for line in lines)
    is_met = any(line["conditions_met"] is True for line in lines)
    notes = [standing(is_theorem, is_met).replace(": ", ":\n")]
    if num_hidden:
        notes.append(f"{num_hidden} off the axis")
    return f"{shortened(drawable(bound_name(bound, kind)))}\n{', '.join(notes)}"


def _order(line: _Line) -> tuple[float, str, str]:
    return float(line["slack_log10"]), str(line["checkpoint"]), str(line["layer"] or "")
