"""Correlations: against scipy, against known truths, and what must not be swept under the rug."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from summaries import X, Y, census, line

from pipeline.correlate import COLUMNS, CorrelationPair, correlation_table, paired_points
from tasks.correlation import (
    MIN_FOR_INTERVAL,
    correlate,
    derived_seed,
    robust_line,
    transformed,
)

METHODS = ("pearson", "spearman", "kendall")
PAIR = CorrelationPair(x=X, y=Y)


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


def lognormal_pair(n, rho, *, seed, noise=0.0):
    """n checkpoints with correlation rho of the logarithms, and errors of ``noise`` sd each."""
    g = generator(seed)
    u = g.standard_normal(n)
    v = rho * u + np.sqrt(1 - rho**2) * g.standard_normal(n)
    sd = noise * g.uniform(0.5, 1.5, (2, n))
    x = 3e4 * np.exp(u + sd[0] * g.standard_normal(n))
    y = 1e3 * np.exp(v + sd[1] * g.standard_normal(n))
    return x, y, sd[0] * x, sd[1] * y


@pytest.mark.parametrize("method", METHODS)
def test_coefficients_with_ties_equal_scipys(method):
    g = generator(0)
    x, y = g.integers(1, 9, 40).astype(float), g.integers(1, 9, 40).astype(float)
    oracle = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    expected = oracle[method](np.log(x), np.log(y)).statistic
    found = correlate(x, y, 0 * x, 0 * y, method=method, seed=0)
    assert found.r == pytest.approx(expected, abs=1e-14)
    assert found.r_corrected == found.r  # nothing to correct without errors
    assert (found.n, found.n_missing, found.reason) == (40, 0, "")


@pytest.mark.parametrize("method", METHODS)
def test_replicates_weigh_a_checkpoint_drawn_twice_as_two_checkpoints(method):
    # The interval without errors is that of a bootstrap written out with scipy.
    x, y, _, _ = lognormal_pair(12, 0.6, seed=1)
    oracle = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    weights = generator(7).multinomial(12, np.full(12, 1 / 12), 300)
    replicates = []
    for w in weights:
        i = np.repeat(np.arange(12), w)
        replicates.append(oracle[method](np.log(x[i]), np.log(y[i])).statistic)
    tail = stats.norm.cdf(np.sqrt(12 / 11) * stats.t.ppf(0.025, 11))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    found = correlate(x, y, 0 * x, 0 * y, method=method, seed=7, num_bootstrap=300)
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high), abs=1e-12)


def test_within_families_pearson_ignores_any_shift_of_a_family():
    x, y, sx, sy = lognormal_pair(40, 0.7, seed=2, noise=0.1)
    families = [f"f{i % 5}" for i in range(40)]
    factor = np.exp(3.0 * np.arange(40) % 5)
    plain = correlate(x, y, sx, sy, families=families, seed=0)
    shifted = correlate(x * factor, y / factor, sx * factor, sy / factor, families=families, seed=0)
    assert shifted.r == pytest.approx(plain.r, abs=1e-12)
    assert shifted.ci_low == pytest.approx(plain.ci_low, abs=1e-9)
    pooled = correlate(x * factor, y / factor, sx, sy, seed=0)
    assert abs(pooled.r - plain.r) > 0.5  # so the shift was not harmless


def test_within_families_ranks_are_ranks_within_the_family():
    x, y, sx, sy = lognormal_pair(30, 0.5, seed=3)
    families = np.array([f"f{i % 4}" for i in range(30)])
    rank_x, rank_y, concordance, pairs = np.zeros(30), np.zeros(30), 0.0, 0
    for family in set(families):
        rows = families == family
        for rank, values in ((rank_x, x), (rank_y, y)):
            rank[rows] = stats.rankdata(values[rows]) - (rows.sum() + 1) / 2
        count = rows.sum() * (rows.sum() - 1) // 2
        concordance += stats.kendalltau(x[rows], y[rows]).statistic * count
        pairs += count
    expected = {"spearman": np.corrcoef(rank_x, rank_y)[0, 1], "kendall": concordance / pairs}
    for method, value in expected.items():
        found = correlate(x, y, sx, sy, method=method, families=list(families), seed=0)
        assert found.r == pytest.approx(value, abs=1e-12)


def coverage(method, rho, noise, truth, *, n=24, repetitions=200):
    """How often the interval holds the truth, and how often that of noise added once more does."""
    hits = 0
    for seed in range(repetitions):
        x, y, sx, sy = lognormal_pair(n, rho, seed=seed, noise=noise)
        found = correlate(x, y, sx, sy, method=method, seed=seed, num_bootstrap=400)
        hits += found.ci_low <= truth <= found.ci_high
    return hits / repetitions


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize(("rho", "noise"), [(0.0, 0.1), (0.8, 0.0), (0.8, 0.3), (0.95, 0.3)])
def test_interval_covers_the_correlation_of_error_free_values(method, rho, noise):
    truth = rho if method == "pearson" else 6 / np.pi * np.arcsin(rho / 2)
    # A true coverage of 0.92 falls below 0.87 in 200 experiments with probability 0.01.
    assert coverage(method, rho, noise, truth) >= 0.87


def test_interval_of_kendall_covers_too():
    assert coverage("kendall", 0.8, 0.2, 2 / np.pi * np.arcsin(0.8), repetitions=100) >= 0.86


def test_noise_pulls_r_to_zero_and_the_correction_pulls_it_back():
    plain, corrected = [], []
    for seed in range(60):
        found = correlate(*lognormal_pair(60, 0.9, seed=seed, noise=0.3), seed=0, num_bootstrap=300)
        plain.append(found.r)
        corrected.append(found.r_corrected)
    # Reliability of both: 1 / (1 + 0.3² · E[u²]), u uniform on [0.5, 1.5], E[u²] = 13/12.
    attenuated = 0.9 / (1 + 0.09 * 13 / 12)
    sem = np.std(plain) / np.sqrt(60)
    assert np.mean(plain) == pytest.approx(attenuated, abs=4 * sem)
    # Linear extrapolation leaves the square of the loss: 0.9 · (1 − 0.91)² = 0.007.
    assert np.mean(corrected) == pytest.approx(0.9, abs=0.008 + 4 * np.std(corrected) / np.sqrt(60))


def test_what_cannot_be_used_is_counted():
    x, y, sx, sy = lognormal_pair(30, 0.5, seed=4, noise=0.1)
    x[:4] = [np.nan, np.inf, 0.0, -3.0]
    y[3:5] = [np.nan, -np.inf]
    found = correlate(x, y, sx, sy, seed=0)
    assert (found.n, found.n_missing) == (25, 5)
    assert found.r == pytest.approx(np.corrcoef(np.log(x[5:]), np.log(y[5:]))[0, 1])
    negative = correlate(x, y, sx, sy, transform_x="identity", seed=0)
    assert (negative.n, negative.n_missing) == (26, 4)  # 0 counts, y = NaN at −3 does not


@pytest.mark.parametrize("method", METHODS)
def test_constant_values_have_no_correlation_and_say_so(method):
    x = np.full(20, 0.1) * 3
    y = np.linspace(1, 2, 20)
    found = correlate(x, y, 0 * x, 0 * y, method=method, seed=0)
    assert np.isnan([found.r, found.ci_low, found.ci_high]).all()
    assert found.reason == "x is constant"
    within = correlate(
        y, np.repeat([0.1, 0.7], 10) * 3, 0 * x, 0 * x, method=method,
        families=["a"] * 10 + ["b"] * 10, seed=0,
    )  # fmt: skip
    assert within.reason == "y is constant within every family"


def test_too_few_checkpoints_have_no_r_and_few_no_interval():
    x, y, sx, sy = lognormal_pair(30, 0.5, seed=5, noise=0.1)
    two = correlate(x[:2], y[:2], sx[:2], sy[:2], seed=0)
    assert np.isnan(two.r)
    assert two.reason == "needs 3 checkpoints, found 2 usable"
    empty = correlate([], [], [], [], seed=0)
    assert (empty.n, empty.n_missing) == (0, 0)
    few = MIN_FOR_INTERVAL - 1
    some = correlate(x[:few], y[:few], sx[:few], sy[:few], seed=0)
    assert np.isfinite(some.r)
    assert np.isnan(some.ci_low)
    assert "no interval below 8 checkpoints" in some.reason
    assert np.isfinite(correlate(x[:8], y[:8], sx[:8], sy[:8], seed=0).ci_low)


def test_checkpoints_alone_in_their_family_are_left_out_with_a_note():
    x, y, sx, sy = lognormal_pair(14, 0.5, seed=6)
    families = ["a"] * 6 + ["b"] * 6 + ["c", "d"]
    found = correlate(x, y, sx, sy, families=families, seed=0)
    assert (found.n, found.n_missing) == (12, 0)
    assert found.reason == "2 checkpoints without siblings in the family, left out"


def test_unknown_and_large_errors_are_noted():
    x, y, sx, sy = lognormal_pair(20, 0.5, seed=7, noise=0.1)
    sx[0], sx[2], sy[1] = np.nan, np.inf, 0.6 * y[1]
    found = correlate(x, y, sx, sy, seed=0)
    assert "2 checkpoints without standard error, taken as exact" in found.reason
    assert "1 checkpoint with a relative standard error above 50 %" in found.reason
    assert np.isfinite(found.ci_low)


def test_delta_method_on_each_scale():
    values, stderr = np.array([4.0, 0.0, -1.0, np.inf]), np.array([0.2, 0.2, 0.2, 0.2])
    log, log_sd = transformed(values, stderr, "log")
    assert log[0] == np.log(4)
    assert log_sd[0] == pytest.approx(0.05)
    assert np.isnan(log[1:]).all()
    root, root_sd = transformed(values, stderr, "sqrt")
    assert root[:2].tolist() == [2.0, 0.0]
    assert root_sd[0] == pytest.approx(0.05)
    assert root_sd[1] == pytest.approx(np.sqrt(0.2))  # not infinite at zero
    assert np.isnan(root[2:]).all()
    same, same_sd = transformed(values, stderr, "identity")
    assert same[:3].tolist() == [4.0, 0.0, -1.0]
    assert same_sd.tolist() == stderr.tolist()


def test_robust_line_finds_the_planted_outlier():
    g = generator(8)
    x = np.linspace(0, 5, 40)
    y = 1.5 * x - 2 + 0.1 * g.standard_normal(40)
    y[17] += 2.0
    slope, intercept, deviations = robust_line(x, y)
    # Theil-Sen has at least 90 % of least squares' efficiency for normal errors.
    sd = 0.1 / np.sqrt(((x - x.mean()) ** 2).sum() * 0.9)
    assert slope == pytest.approx(1.5, abs=4 * sd)
    assert intercept == pytest.approx(-2, abs=4 * sd * 5)
    assert np.argmax(np.abs(deviations)) == 17
    assert deviations[17] == pytest.approx(20, rel=0.5)


def test_seeds_depend_on_names_not_on_their_concatenation():
    seeds = {derived_seed(0, "a", "bc"), derived_seed(0, "ab", "c"), derived_seed(1, "a", "bc")}
    assert len(seeds) == 3
    assert derived_seed(0, "a", "bc") == derived_seed(0, "a", "bc")


def test_table_has_the_pair_in_all_groups_with_every_planned_checkpoint_counted():
    summary = census(60)
    table = correlation_table(summary, [PAIR], seed=0, num_bootstrap=200)
    assert list(table.columns) == list(COLUMNS)
    everyone = table[table["group"] == "all"]
    assert everyone["method"].tolist() == list(METHODS)
    assert everyone["n"].tolist() == [57] * 3
    assert everyone["n_missing"].tolist() == [3] * 3
    usable = summary[(summary["series"] == X) & summary["value"].notna()]["family"].value_counts()
    families = sorted(f"family:{name}" for name in usable.index[usable >= 3])
    assert sorted(set(table["group"])) == ["all", *families, "within"]
    assert (table["ci_low"].isna() | (table["ci_low"] <= table["ci_high"])).all()


def test_table_is_the_same_bytes_for_every_order_of_the_rows():
    summary = census(40)
    shuffled = summary.sample(frac=1.0, random_state=3)
    tables = [correlation_table(s, [PAIR], seed=5, num_bootstrap=200) for s in (summary, shuffled)]
    assert tables[0].to_csv() == tables[1].to_csv()
    other = correlation_table(summary, [PAIR], seed=6, num_bootstrap=200)
    assert other["r"].equals(tables[0]["r"])
    assert not other["ci_low"].equals(tables[0]["ci_low"])


def test_adding_a_pair_does_not_move_the_numbers_of_another():
    summary = census(30, oracle=True)
    other = CorrelationPair(x=f"{X}@dense", y=Y, methods=("spearman",))
    alone = correlation_table(summary, [PAIR], seed=0, num_bootstrap=100)
    both = correlation_table(summary, [other, PAIR], seed=0, num_bootstrap=100)
    assert both[both["x"] == X].reset_index(drop=True).equals(alone)


def test_a_checkpoint_with_one_series_only_is_missing():
    summary = pd.DataFrame([line(f"n{i}", "f", s, 1.0 + i, 0.1) for i in range(5) for s in (X, Y)])
    summary = summary[(summary["checkpoint"] != "n2") | (summary["series"] != Y)]
    table = correlation_table(summary, [PAIR], seed=0, num_bootstrap=50)
    assert table["n"].tolist()[0] == 4
    assert table["n_missing"].tolist()[0] == 1


def test_values_with_wide_error_bars_are_left_out_where_the_pair_says_so_and_counted():
    wide = {("n1", X): 0.5, ("n2", Y): -0.5}  # the sign of a value has no say
    lines = [
        line(f"n{i}", "f", s, (1.0 + i) * (-1 if (f"n{i}", s) in wide and s == Y else 1),
             0.5 * (1.0 + i) if (f"n{i}", s) in wide else 0.1)
        for i in range(6) for s in (X, Y)
    ]  # fmt: skip
    identity = {"transform_x": "identity", "transform_y": "identity"}
    summary = pd.DataFrame(lines)
    everyone = CorrelationPair(x=X, y=Y, **identity)
    precise = CorrelationPair(x=X, y=Y, **identity, max_relative_stderr=0.15)
    narrow = summary[~summary["checkpoint"].isin(["n1", "n2"])]
    found = correlation_table(summary, [precise], seed=0, num_bootstrap=50)
    alone = correlation_table(narrow, [everyone], seed=0, num_bootstrap=50)
    assert found["r"].equals(alone["r"])
    assert set(found["n_missing"]) == {2}
    assert set(alone["n_missing"]) == {0}
    text = "2 missing for a relative standard error above 0.15"
    assert found["reason"].str.contains(text).all()
    assert not alone["reason"].str.contains("relative").any()
    assert paired_points(summary, everyone)["usable"].all()


def test_all_failed_unknown_series_and_empty_summaries_give_reasons():
    failed = correlation_table(census(6, failed=6, outliers=0), [PAIR], seed=0)
    assert failed["r"].isna().all()
    assert failed["n_missing"].tolist() == [6] * len(failed)
    unknown = correlation_table(census(6), [CorrelationPair(x="nope", y=Y)], seed=0)
    assert unknown["reason"].str.contains("this run has no series 'nope'").all()
    empty = correlation_table(census(6).iloc[:0], [PAIR], seed=0)
    assert empty["n"].tolist() == [0] * 6
    assert correlation_table(census(6), [], seed=0).empty


def test_two_rows_of_one_checkpoint_and_series_are_refused():
    summary = pd.concat([census(5), census(5).iloc[-1:]])
    with pytest.raises(ValueError, match="twice for series 'adaptive_sharpness'"):
        paired_points(summary, PAIR)


def test_pairs_are_checked_where_they_are_built():
    for wrong in ({"y": X}, {"methods": []}, {"methods": ["pearson"] * 2}, {"transform_x": "exp"}):
        with pytest.raises(ValueError, match="validation error"):
            CorrelationPair.model_validate({"x": X, "y": Y, **wrong})
    from_toml = CorrelationPair.model_validate({"x": X, "y": Y, "methods": ["kendall"]})
    assert from_toml.methods == ("kendall",)


def test_three_hundred_families_of_one_are_no_groups_of_their_own():
    summary = census(300, outliers=0).assign(family=lambda s: s["checkpoint"])
    table = correlation_table(summary, [PAIR], seed=0, num_bootstrap=50)
    assert set(table["group"]) == {"all", "within"}
    within = table[table["group"] == "within"]
    assert within["r"].isna().all()
    assert within["reason"].str.contains("297 checkpoints without siblings").all()


def test_values_without_a_logarithm_are_missing_and_named():
    x, y = np.exp(np.arange(12.0)), np.exp(np.arange(12.0) ** 1.5)
    y[:2] = (-1.0, 0.0)
    found = correlate(x, y, 0 * x, 0 * x, transform_x="log", transform_y="log", seed=0)
    assert (found.n, found.n_missing) == (10, 2)
    assert "2 checkpoints not positive" in found.reason
