"""The report: well-formed, self-contained, escaped, and complete about what is missing."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from summaries import X, Y, census, line

from pipeline.correlate import CorrelationPair, correlation_table
from pipeline.figures import MAX_LEGEND, scatter
from pipeline.plot import scatter_plot
from pipeline.report import write_report
from pipeline.twins import compare_twins

PAIR = CorrelationPair(x=X, y=Y)
VOID = {"meta", "input", "img", "br", "link"}
EVIL = "<script>alert(1)</script>&\"'\u202e日本\x00"


class Page(HTMLParser):
    """A strict reader: every tag closes; scripts, texts, ids and rows are collected."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.scripts, self.styles = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        {"script": self.scripts, "style": self.styles}.get(inside, self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def report(summary, *, pairs=(PAIR,), path=None, **changes):
    arguments = {
        "title": "census",
        "manifest_toml": 'name = "census"\n',
        "summary": summary,
        "correlations": correlation_table(summary, pairs, seed=0, num_bootstrap=50),
        "pair_plot": None,
        "matrix": pd.DataFrame(),
        "bounds": pd.DataFrame(),
        "num_layer_lines": 0,
        "units": pd.DataFrame(),
        "failures": pd.DataFrame(),
        "checks": pd.DataFrame(),
        "figures": [],
        "provenance": {"torch": "2.14", "weights": {"vit": "sha256:12", "deit": "sha256:34"}},
    }
    return write_report(path, **(arguments | changes))


def unit(metric, *, status="ok", seconds=2.5, device="cpu"):
    return {
        "metric": metric, "label": metric, "status": status, "seconds": seconds, "device": device,
        "host": "a", "num_rows": 10 if status == "ok" else 0, "peak_bytes": 2**31,
    }  # fmt: skip


def test_report_is_well_formed_and_states_the_result(tmp_path):
    summary = census(60, oracle=True)
    table = correlation_table(summary, [PAIR], seed=0, num_bootstrap=50)
    figures = scatter(summary, PAIR, table, tmp_path / "fig")
    html = report(summary, correlations=table, figures=figures, path=tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    assert html.startswith("<!DOCTYPE html>")
    page = Page(html)
    row = table[(table["group"] == "all") & (table["method"] == "pearson")].iloc[0]
    result = f"Pearson r = {row['r']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
    assert result in page.text
    assert "over 57 checkpoints, 3 planned checkpoints missing" in page.text
    assert "57 of 60 planned checkpoints are complete" in page.text
    assert "arXiv 2310.01770" in page.text
    assert page.attributes.count(("g", "class", "point")) == 57
    names = set(summary["checkpoint"])
    assert all(name in page.text for name in names)


def test_report_loads_nothing_from_anywhere():
    html = report(census(20, oracle=True))
    page = Page(html)
    assert "link" not in page.tags
    sources = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(v.startswith(("#", "data:", "https://arxiv.org/")) for v in sources)
    assert [t for t, name, v in page.attributes if name == "href" and v.startswith("http")] == ["a"]
    policy = next(v for _, n, v in page.attributes if n == "content" and v.startswith("default"))
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", html)


def test_every_name_is_escaped():
    summary = census(12, families=[EVIL, "b"], oracle=True)
    summary["checkpoint"] = EVIL + summary["checkpoint"]
    summary["status_text"] = EVIL
    failure = {
        "checkpoint": EVIL, "metric": EVIL, "label": EVIL, "failure_type": EVIL,
        "failure_message": EVIL, "failure_hint": EVIL, "failure_traceback": EVIL,
    }  # fmt: skip
    html = report(
        summary,
        title=EVIL,
        manifest_toml=EVIL,
        failures=pd.DataFrame([failure]),
        units=pd.DataFrame([unit(EVIL, device=EVIL)]),
        checks=pd.DataFrame({EVIL: [EVIL]}),
        provenance={EVIL: EVIL, "more": {"a": EVIL}},
    )
    page = Page(html)
    assert page.tags.count("script") == 1
    assert "alert(1)" not in "".join(page.scripts)
    assert "<script>alert(1)</script>&\"'" in page.text
    assert "\x00" not in html
    attributes = {name for _, name, _ in page.attributes}
    assert not any(name.startswith("on") for name in attributes)
    html.encode("utf-8")


def test_text_that_is_no_unicode_does_not_stop_the_report():
    html = report(census(6, failed=0, outliers=0), title="bad\udcffname")
    assert "bad\ufffdname" in Page(html).text
    html.encode("utf-8")


def test_missing_values_show_their_reason_and_failures_their_next_step():
    failure = {
        "checkpoint": "vit_a", "metric": X, "label": X, "start": 0, "stop": 50,
        "failure_type": "OutOfMemory", "failure_message": "needs 9 GB",
        "failure_hint": "flatcensus resume runs/a", "failure_traceback": None,
    }  # fmt: skip
    whole = failure | {"checkpoint": "vit_b", "start": None, "stop": None}
    page = Page(report(census(10, failed=2), failures=pd.DataFrame([failure, whole])))
    assert "vit_a normalized_mls 0–50 OutOfMemory needs 9 GB" in page.text
    assert "vit_b normalized_mls OutOfMemory needs 9 GB" in page.text
    assert "2 entries: values that were planned and are not there" in page.text
    assert "OutOfMemory: batch_size = 8 needs 9.1 GB" in page.text
    assert "flatcensus resume runs/a" in page.text
    assert "traceback" not in page.text.lower()
    complete = Page(report(census(10, failed=0)))
    assert "Every planned value is there." in complete.text


def test_cost_is_summed_per_measurement_and_device():
    units = [unit("mls")] * 3 + [unit("mls", status="failed")] + [unit("mls", device="cuda")]
    page = Page(report(census(5), units=pd.DataFrame(units)))
    assert "mls mls cpu 1 3 1 30 10 2 mls mls cuda 1 1 0 10 2.5 2" in page.text
    unknown = pd.DataFrame([unit("mls") | {"peak_bytes": None}])
    assert "mls mls cpu 1 1 0 10 2.5 –" in Page(report(census(5), units=unknown)).text


def test_degenerate_runs_have_a_report():
    constant = pd.DataFrame([line(f"n{i}", "f", s, 2.0, 0.1) for i in range(9) for s in (X, Y)])
    infinite = census(9, failed=0).assign(value=np.inf)
    cases = {
        "No checkpoint is planned.": census(5).iloc[:0],
        "No checkpoint has both values yet (5 planned).": census(5, failed=5, outliers=0),
        "needs 3 checkpoints, found 1 usable": census(1, failed=0, outliers=0),
        "x and y are constant": constant,
        "∞": infinite,
    }
    for sentence, summary in cases.items():
        assert sentence in Page(report(summary)).text
    nothing = Page(report(census(5), pairs=()))
    assert "No correlation was asked for." in nothing.text


@pytest.mark.parametrize("transform", ["identity", "sqrt", "log"])
def test_points_ticks_and_bars_stay_inside_the_plot(transform):
    pair = CorrelationPair(x=X, y=Y, transform_x=transform, transform_y=transform)
    tiny = census(20).assign(value=lambda s: 1 + 1e-9 * s["value"])
    huge = census(20).assign(value=lambda s: s["value"] * 1e300)
    wild = census(20).assign(stderr=1e9)
    for summary in (census(30), tiny, huge, wild):
        plot = scatter_plot(summary, pair)
        assert 2 <= len(plot.x_ticks) <= 12
        for p in plot.points:
            assert 96 <= p.x <= 744
            assert 96 <= p.x_bar[0] <= p.x <= p.x_bar[1] <= 744
            assert 14 <= p.y_bar[1] <= p.y <= p.y_bar[0] <= 414


def test_ticks_stand_where_their_numbers_belong():
    plot = scatter_plot(census(60), PAIR)
    at = {tick.text: tick.at for tick in plot.x_ticks}
    step = at["20000"] - at["10000"]
    assert at["100000"] - at["50000"] == pytest.approx(step, abs=0.03)
    assert at["50000"] - at["20000"] == pytest.approx(step * np.log(2.5) / np.log(2), abs=0.03)


def test_checkpoints_without_a_family_are_one_unnamed_group():
    page = Page(report(census(12, failed=0).assign(family=None)))
    assert "no family (12)" in page.text
    assert "nan" not in page.text.split()


def test_three_hundred_families_fold_in_the_legend_and_none_is_lost():
    summary = census(300, families=[f"f{i:03d}" for i in range(400)], failed=0)
    plot = scatter_plot(summary, PAIR)
    assert len(plot.legend) == MAX_LEGEND
    counts = [int(entry.text.rpartition("(")[2][:-1]) for entry in plot.legend]
    assert sum(counts) == len(plot.points) == 300
    assert {p.family for p in plot.points} == {entry.family for entry in plot.legend}
    Page(report(summary))


def test_oracle_table_tells_inside_outside_and_unknown():
    def pair(name, value, expected, *, bound, draws=float("nan"), images=100):
        one = line(name, "f", X, value, 1.0, bound=bound)
        other = line(name, "f", f"{X}@dense", expected, 1.0, bound=0.0 if bound == bound else bound)
        return [one | {"stderr_draws": draws, "num_samples": images}, other]

    nan = float("nan")
    rows = [
        *pair("inside", 10.0, 10.01, bound=0.02),
        *pair("outside", 10.0, 10.03, bound=0.02),
        *pair("rounding", 10.0, 10.000005, bound=0.0),
        *pair("draws", 10.0, 10.5, bound=nan, draws=0.2),
        *pair("too far", 10.0, 10.7, bound=nan, draws=0.2),
        *pair("other images", 10.0, 10.0, bound=0.02, images=50),
        *pair("no error known", 10.0, 10.0, bound=nan),
        *pair("failed", nan, 10.0, bound=0.02),
    ]
    table = compare_twins(pd.DataFrame(rows)).set_index("checkpoint")
    assert table["verdict"].to_dict() == {
        "inside": "yes", "outside": "no", "rounding": "yes", "draws": "yes", "too far": "no",
        "other images": "–", "no error known": "–", "failed": "–",
    }  # fmt: skip
    assert set(table["reference"]) == {f"{X}@dense"}
    assert table.loc["inside", "relative_difference"] == pytest.approx(0.01 / 10.01)
    assert compare_twins(census(5)).empty


def test_same_arguments_give_the_same_text():
    assert report(census(20)) == report(census(20))


def test_tables_sort_by_the_numbers_and_not_by_their_looks():
    page = Page(report(census(10)))
    raw = [float(v) for _, name, v in page.attributes if name == "data-v"]
    values = census(10)["value"].dropna()
    assert set(values) <= set(raw)
