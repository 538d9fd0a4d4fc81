"""Names in figures: what the font can draw, and labels that keep out of each other's way."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.transforms import Bbox

MAX_CHARACTERS = 30  # chosen: of a name in a figure; the report has it in full
FONT_SIZE = 6.5
GAP = 5.0  # points between a marker and its name
# Where a name may stand: offset in gaps, and which of its edges is nearest to the marker.
SPOTS = [
    (dx * reach, dy * reach, {1: "left", 0: "center", -1: "right"}[dx],
     {1: "bottom", 0: "center", -1: "top"}[dy])
    for reach in (1.0, 2.2, 3.6, 5.2, 7.0, 9.0)
    for dx, dy in ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))
]  # fmt: skip


def name_points(axes: Axes, x: np.ndarray, y: np.ndarray, names: Mapping[int, str]) -> None:
    """Write ``names[i]`` beside point i of (x, y), in data coordinates.

    Each name takes the spot with the least overlap with names already written, points and the
    border of the axes; far spots get a thin line to their point. Call it when the layout is final.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    pixels = axes.transData.transform(np.column_stack([x, y])) if len(x) else np.zeros((0, 2))
    points_per_pixel = 72 / figure.dpi
    gap = GAP / points_per_pixel
    taken: list[Bbox] = []
    for index, name in names.items():
        text = axes.annotate(drawable(shortened(name)), (x[index], y[index]), xytext=(0, 0),
                             textcoords="offset points", fontsize=FONT_SIZE, color="#333333",
                             parse_math=False, zorder=4, annotation_clip=False)  # fmt: skip
        extent = text.get_window_extent()
        boxes = [_box(pixels[index], extent.width, extent.height, spot, gap) for spot in SPOTS]
        costs = [
            _cost(box, taken, pixels, axes.bbox) + 0.01 * extent.width * extent.height * rank
            for rank, box in enumerate(boxes)
        ]
        best = int(np.argmin(costs))
        taken.append(boxes[best])
        dx, dy, horizontal, vertical = SPOTS[best]
        text.set(position=(dx * GAP, dy * GAP), ha=horizontal, va=vertical)
        if max(abs(dx), abs(dy)) > 1:
            near = boxes[best]
            end = np.clip(pixels[index], (near.x0, near.y0), (near.x1, near.y1))
            start = (end - pixels[index]) * points_per_pixel
            axes.annotate("", (x[index], y[index]), xytext=tuple(start),
                          textcoords="offset points", zorder=2.5,
                          arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5},
                          )  # fmt: skip


def shortened(name: str, limit: int = MAX_CHARACTERS) -> str:
    """The name, or its two ends with an ellipsis between."""
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return f"{name[: limit - 1 - tail]}…{name[-tail:]}"


def drawable(text: str) -> str:
    """The text with every character that the figure's font lacks replaced by ``�``."""
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))

    def known(character: str) -> bool:
        if character == "\n":
            return True
        is_control = unicodedata.category(character).startswith("C")
        return not is_control and font.get_char_index(ord(character)) != 0

    return "".join(c if known(c) else "\ufffd" for c in text)


def _box(
    point: np.ndarray, width: float, height: float, spot: tuple[float, float, str, str], gap: float
) -> Bbox:
    dx, dy, horizontal, vertical = spot
    left = point[0] + dx * gap - {"left": 0, "center": 0.5, "right": 1}[horizontal] * width
    bottom = point[1] + dy * gap - {"bottom": 0, "center": 0.5, "top": 1}[vertical] * height
    return Bbox.from_bounds(left, bottom, width, height)


def _cost(box: Bbox, taken: list[Bbox], pixels: np.ndarray, inside: Bbox) -> float:
    """Covered area in pixels²: other names weigh most, then the border, then covered points."""
    overlap = sum(_area(Bbox.intersection(box, other)) for other in taken)
    outside = box.width * box.height - _area(Bbox.intersection(box, inside))
    margin = 0.3 * box.height
    covered = (
        (pixels[:, 0] > box.x0 - margin) & (pixels[:, 0] < box.x1 + margin)
        & (pixels[:, 1] > box.y0 - margin) & (pixels[:, 1] < box.y1 + margin)
    )  # fmt: skip
    return 20 * overlap + 10 * outside + 0.15 * box.width * box.height * float(covered.sum())


def _area(box: Bbox | None) -> float:
    return box.width * box.height if box is not None else 0.0
