"""The correlation matrix: its table, its figure and its place in the report."""

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats
from summaries import many_series
from test_bounds_summary import check, missing
from test_report import EVIL, Page, report

from pipeline.bounds_figure import bounds_figure
from pipeline.matrix import PairPlot, matrix_table, series_values
from pipeline.matrix_view import matrix_view
from pipeline.pair_plot import ink, luminance, pair_plot, shade

SUMMARY = many_series(4)


def plot_of(summary, **transforms):
    names = tuple(dict.fromkeys(summary["series"]))
    return PairPlot(transforms=transforms).model_copy(update={"series": names})


def table_of(summary, **transforms):
    return matrix_table(summary, plot_of(summary, **transforms), seed=0, num_bootstrap=100)


def row_of(table, x, y, method, group="all"):
    keys = {"x": x, "y": y, "method": method, "group": group}
    return table[np.logical_and.reduce([table[k] == v for k, v in keys.items()])].iloc[0]


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


def test_every_pair_has_the_coefficients_of_scipy_on_its_scales():
    summary = SUMMARY.copy()
    q2 = summary["series"] == "q2"
    summary.loc[q2, "value"] -= 1.0  # some are negative: no logarithm
    table = table_of(summary, q3="sqrt")
    wide = summary.pivot(index="checkpoint", columns="series", values="value")
    scaled = {"q0": np.log(wide["q0"]), "q1": np.log(wide["q1"]), "q2": wide["q2"],
              "q3": np.sqrt(wide["q3"])}  # fmt: skip
    assert len(table) == 6 * 2 * 2
    for x, y in itertools.combinations(scaled, 2):
        both = scaled[x].notna() & scaled[y].notna()
        a, b = scaled[x][both], scaled[y][both]
        pearson, spearman = (row_of(table, x, y, m) for m in ("pearson", "spearman"))
        assert pearson["r"] == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
        assert spearman["r"] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert pearson["ci_low"] < pearson["ci_high"]
        assert np.isnan(spearman["ci_low"])
        family = summary.drop_duplicates("checkpoint").set_index("checkpoint")["family"][a.index]
        inner = stats.pearsonr(*(v - v.groupby(family).transform("mean") for v in (a, b)))
        within = row_of(table, x, y, "pearson", "within")
        assert within["r"] == pytest.approx(inner.statistic, abs=1e-12)
    scales = table.set_index("y")["transform_y"].to_dict()
    assert scales == {"q1": "log", "q2": "identity", "q3": "sqrt"}


def test_missing_and_infinite_values_are_counted_and_constants_have_no_coefficient():
    summary = SUMMARY.copy()
    rows = summary.index[summary["series"] == "q2"]
    summary.loc[rows[:2], "value"] = np.inf
    summary.loc[summary["series"] == "q3", "value"] = 2.0
    table = table_of(summary)
    assert row_of(table, "q0", "q1", "pearson")[["n", "n_missing"]].to_list() == [29, 1]
    assert row_of(table, "q1", "q2", "pearson")[["n", "n_missing"]].to_list() == [27, 3]
    constant = row_of(table, "q0", "q3", "pearson")
    assert np.isnan(constant["r"])
    assert "y is constant" in constant["reason"]
    gaps = {s.series: (s.gaps, s.is_constant) for s in series_values(summary, plot_of(summary))}
    assert gaps == {
        "q0": ("", False), "q1": ("1 missing", False), "q2": ("2 infinite", False),
        "q3": ("", True),
    }  # fmt: skip
    cells = {row.series: row.cells for row in matrix_view(summary, plot_of(summary), table)}
    assert cells["log q3"][0].text == "constant"
    assert cells["log q2"][1].lines[-1] == "n 27, 3 missing"
    assert cells["log q2"][2].lines == ["n 28, 2 infinite"]
    assert cells["log q3"][3].text == "constant: 2"


def test_the_table_does_not_depend_on_the_order_of_the_summary():
    plot = plot_of(SUMMARY)
    shuffled = SUMMARY.sample(frac=1.0, random_state=3)
    one, two = (matrix_table(s, plot, seed=0, num_bootstrap=50) for s in (SUMMARY, shuffled))
    pd.testing.assert_frame_equal(one, two)
    assert matrix_table(SUMMARY, None, seed=0).empty


def test_numbers_are_readable_on_every_shade():
    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    inks = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}
    for r in np.linspace(-1, 1, 401):
        assert contrast(shade(r), inks[ink(shade(r))]) > 4.5
        assert abs(r) < 0.9 or luminance(shade(r)) < 0.25  # in grey, strong is dark


def test_same_table_gives_the_same_figures_which_say_what_the_table_says(tmp_path, shown):
    table = table_of(SUMMARY)
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        out = tmp_path / name / "pair_plot"
        files.append(pair_plot(SUMMARY, plot_of(SUMMARY), table, out, pdf=True))
    assert [p.name for p in files[0]] == ["pair_plot.svg", "pair_plot.png", "pair_plot.pdf"]
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes()
    row = row_of(table, "q0", "q1", "pearson")
    assert f"{row['r']:+.2f}".replace("-", "−") in shown
    assert "n = 29, 1 missing" in shown
    assert {"q0", "q1", "q2", "q3"} <= set(shown)


@pytest.mark.parametrize("value", [2.0, np.inf, np.nan])
def test_degenerate_series_are_drawn_and_shown_with_their_reason(tmp_path, shown, value):
    one = many_series(1)
    (row,) = matrix_view(one, plot_of(one), table_of(one))
    assert row.cells[0].lines == ["n 30"]
    assert pair_plot(one, plot_of(one), table_of(one), tmp_path / "one")
    odd = many_series(2)
    odd.loc[odd["series"] == "q1", "value"] = value
    table = table_of(odd)
    pair_plot(odd, plot_of(odd), table, tmp_path / "odd")
    reason = "constant" if np.isfinite(value) else "needs 3 checkpoints"
    assert reason in shown
    assert reason in Page(report(odd, pair_plot=plot_of(odd), matrix=table)).text


def test_names_in_the_matrix_are_escaped():
    summary = many_series(2)
    summary["series"] = summary["series"] + EVIL
    html = report(summary, pair_plot=plot_of(summary), matrix=table_of(summary))
    page = Page(html)
    assert page.tags.count("script") == 1
    assert page.text.count("log q0<script>alert(1)</script>") >= 2
    assert "No pair plot was asked for." in Page(report(summary)).text


def test_bounds_are_counted_and_a_failing_theorem_is_loud(tmp_path):
    good = [check(c, "yes", kind="untied", is_theorem=True) for c in "abc"]
    printed = [check(c, "no", family="<b>") for c in "ab"] + [missing("z")]
    files = bounds_figure(pd.DataFrame(good + printed), tmp_path / "bounds", pdf=True)
    assert [p.name for p in files] == ["bounds.svg", "bounds.png", "bounds.pdf"]
    html = report(SUMMARY, bounds=pd.DataFrame(good + printed), figures=files)
    text = Page(html).text
    assert "(11) untied theorem 3" in text
    assert "(11) printed not a theorem 2 1 2 0 2 0 0 −0.5 −0.5" in text
    assert "cannot" not in text
    assert html.count("data:image/svg+xml") == 1
    unmet = pd.DataFrame(
        [check(c, "no", kind="printed", is_theorem=True, conditions_met=False) for c in "ab"]
    )
    assert "theorem here: conditions not met" in Page(report(SUMMARY, bounds=unmet)).text
    broken = pd.DataFrame([*good, check("d", "no", kind="untied", is_theorem=True)])
    assert "1 check fails that cannot: a theorem" in Page(report(SUMMARY, bounds=broken)).text
    assert bounds_figure(pd.DataFrame([missing("z")]), tmp_path / "none") == []
