"""Figures: deterministic, complete about what they leave out, and safe with any name."""

import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from summaries import X, Y, census, line

from pipeline.correlate import CorrelationPair, correlation_table, paired_points
from pipeline.figures import MAX_LEGEND, family_styles, outliers, scatter
from pipeline.labels import axis_label, number
from pipeline.naming import drawable, name_points, shortened

PAIR = CorrelationPair(x=X, y=Y)


@pytest.fixture
def shown(monkeypatch):
    """All texts of the figures drawn in a test."""
    texts = []
    original = Figure.savefig

    def savefig(figure, *args, **kwargs):
        texts.extend(t.get_text() for t in figure.findobj(matplotlib.text.Text))
        return original(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return texts


def draw(summary, folder, *, pair=PAIR, pdf=False):
    table = correlation_table(summary, [pair], seed=0, num_bootstrap=50)
    return scatter(summary, pair, table, folder / "fig.4", pdf=pdf)


def test_same_tables_give_the_same_bytes_whatever_the_users_settings(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    summary = census(30)
    first = draw(summary, tmp_path / "a", pdf=True)
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "x", "axes.facecolor": "red"}):
        second = draw(summary.sample(frac=1.0, random_state=1), tmp_path / "b", pdf=True)
    assert [p.name for p in first] == ["fig.4.svg", "fig.4.png", "fig.4.pdf"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert first[0].read_bytes().count(b"<dc:date>") == 0


def test_heading_says_r_interval_n_and_missing(tmp_path, shown):
    summary = census(40)
    table = correlation_table(summary, [PAIR], seed=0, num_bootstrap=50)
    draw(summary, tmp_path)
    r = table.loc[(table["group"] == "all") & (table["method"] == "pearson"), "r"].item()
    heading = next(t for t in shown if "n = 37, 3 missing" in t)
    assert f"Pearson r = {r:.2f} [" in heading
    assert "Spearman ρ = " in heading


def test_any_family_name_can_be_drawn(tmp_path, shown):
    # Warnings are errors: a glyph missing from the font would raise.
    names = ["a$b$c", "x^2_{y}", "<script>", "日本語", "_hidden", "a\nb\x07", '"', "", "\\alpha$"]
    summary = census(60, families=names, failed=0, outliers=1)
    svg, _ = draw(summary, tmp_path)
    ET.fromstring(svg.read_text())
    legend = [text.strip("\u2009") for text in shown]
    for name in names:
        start = drawable(name) or "no family"
        assert any(text.startswith(f"{start} (") for text in legend)


def test_names_of_points_are_not_read_as_mathematics(tmp_path, shown):
    summary = census(30, failed=0, outliers=0)
    far = summary["checkpoint"].iloc[0]
    summary.loc[(summary["checkpoint"] == far) & (summary["series"] == Y), "value"] *= 1e4
    summary["checkpoint"] = summary["checkpoint"].replace(far, "vit$\\frac{1}$")
    draw(summary, tmp_path)
    assert "vit$\\frac{1}$" in shown


def test_planted_outliers_are_named_and_the_rest_counted(tmp_path, shown):
    summary = census(100, noise=0.02, outliers=0)
    rows = summary.index[(summary["series"] == Y) & summary["value"].notna()][:15]
    summary.loc[rows, "value"] *= np.exp(8 + 0.1 * np.arange(15))
    far = outliers(paired_points(summary, PAIR), PAIR)
    assert set(summary.loc[rows, "checkpoint"]) <= set(far["checkpoint"])
    draw(summary, tmp_path)
    assert sum(shortened(name) in shown for name in far["checkpoint"]) == 12
    assert any(f"12 of {len(far)} outliers named." in t for t in shown)


def test_points_that_a_log_axis_cannot_show_are_counted(tmp_path, shown):
    summary = census(30, failed=0)
    rows = summary.index[summary["series"] == Y][:4]
    summary.loc[rows, "value"] = [-1.0, 0.0, -5.0, np.inf]
    draw(summary, tmp_path)
    assert any("3 checkpoints not drawn: y not positive." in t for t in shown)
    assert any("n = 26, 4 missing" in t for t in shown)


def test_many_families_fold_into_other_and_say_how_many(tmp_path, shown):
    summary = census(300, families=[f"f{i:03d}" for i in range(400)], failed=0)
    families = summary["family"].to_list()
    styles = family_styles(families)
    named = [s for s in styles.values() if s.named]
    assert len(named) == MAX_LEGEND - 1
    draw(summary, tmp_path)
    folded = len(set(families)) - len(named)
    assert any(t.startswith(f"other: {folded} families (") for t in shown)


def test_families_that_the_legend_names_all_look_different():
    styles = family_styles([f"f{i}" for i in range(MAX_LEGEND)])
    assert len({(s.color, s.marker) for s in styles.values()}) == MAX_LEGEND


@pytest.mark.parametrize("transform", ["sqrt", "log"])
def test_degenerate_summaries_are_drawn(tmp_path, transform):
    pair = CorrelationPair(x=X, y=Y, transform_x=transform, transform_y=transform)
    one = census(1, failed=0, outliers=0)
    none = census(3, failed=3, outliers=0)
    constant = pd.DataFrame([line(f"n{i}", "f", s, 2.0, 0.1) for i in range(9) for s in (X, Y)])
    zero = constant.assign(value=0.0)
    wild = census(12, failed=0).assign(stderr=1e12)
    unknown = census(12, failed=0).assign(stderr=np.nan)
    for summary in (one, none, constant, zero, wild, unknown):
        for path in draw(summary, tmp_path, pair=pair):
            assert path.stat().st_size > 1000


def test_names_keep_out_of_each_others_way():
    figure = Figure(dpi=100)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    x, y = np.array([5.0, 5.1, 5.0, 5.1]), np.array([5.0, 5.0, 5.1, 5.1])
    figure.draw_without_rendering()
    name_points(axes, x, y, {i: f"checkpoint_number_{i}" for i in range(4)})
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text()]
    assert len(boxes) == 4
    for i, one in enumerate(boxes):
        assert axes.bbox.fully_containsx(one.x0)
        assert axes.bbox.fully_containsx(one.x1)
        for other in boxes[i + 1 :]:
            assert one.x1 < other.x0 or other.x1 < one.x0 or one.y1 < other.y0 or other.y1 < one.y0


def test_labels_define_the_quantity_and_its_unit():
    assert axis_label(f"{X}@dense", "log").startswith("Normalized MLS (dense), in outputs²\n")
    assert axis_label(Y, "sqrt").startswith("square root of Adaptive sharpness")
    assert axis_label("my_metric", "log") == "my metric"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 4, "0"), (1234.56, 4, "1235"), (170312.0, 4, "170300"), (1e7, 4, "10⁷"),
        (-3.2e-7, 2, "−3.2×10⁻⁷"), (0.00012, 4, "0.00012"), (999999.9, 3, "10⁶"),
        (float("nan"), 4, "–"), (float("inf"), 4, "∞"), (float("-inf"), 4, "−∞"), (100, 9, "100"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, digits, text):
    assert number(value, digits) == text
