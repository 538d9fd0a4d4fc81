"""Bounds in few numbers: what holds, fails, is undefined or missing, and what must not fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import call
from populations import save_mlp, write_manifest
from synthetic import Layered

from pipeline.bounds_summary import COLUMNS, bounds_headline, num_violated, summarize_bounds
from tasks.registry import METRICS


def check(checkpoint: str, holds: str, **changes: Any) -> dict[str, Any]:
    """One line of a ``bounds`` table."""
    slack = {"yes": 1.0, "no": -0.5}.get(holds, math.nan)
    known = {
        "checkpoint": checkpoint, "family": "f", "tag": "", "metric": "bounds", "label": "",
        "bound": "11", "kind": "printed", "layer": None, "left": 1.0, "right": 10.0**slack,
        "slack_log10": slack, "holds": holds, "is_theorem": False, "conditions_met": True,
        "conditions": "none", "num_samples": 4, "spec_key": "k",
    }  # fmt: skip
    return known | changes


def missing(checkpoint: str, **changes: Any) -> dict[str, Any]:
    nothing = {"bound": "", "kind": "", "is_theorem": None, "conditions_met": None}
    return check(checkpoint, "missing", num_samples=0, **(nothing | changes))


LINES = [
    check("a", "yes"),
    check("b", "no"),
    check("c", "undefined", conditions_met=False),
    check("a", "yes", kind="untied", is_theorem=True, slack_log10=3.0),
    check("b", "no", kind="untied", is_theorem=True, conditions_met=False),
    check("c", "no", kind="untied", is_theorem=True, slack_log10=-2.0),
    check("a", "yes", bound="12b", kind="", layer="one", slack_log10=math.inf),
    check("a", "yes", bound="12b", kind="", layer="two", slack_log10=2.0),
    missing("d"),
    missing("e", metric="other"),
]
TABLE = pd.DataFrame(LINES)


def test_checks_are_counted_by_inequality_and_form():
    found = summarize_bounds(TABLE)
    assert list(zip(found["bound"], found["kind"], strict=True)) == [
        ("11", "printed"), ("11", "untied"), ("12b", ""),
    ]  # fmt: skip
    assert found.drop(columns=["bound", "kind"]).to_dict("list") == {
        "is_theorem": [False, True, False],
        "num_checkpoints": [3, 3, 1],
        "num_missing": [1, 1, 1],
        "num_checks": [3, 3, 2],
        "num_hold": [1, 1, 2],
        "num_fail": [1, 2, 0],
        "num_undefined": [1, 0, 0],
        "num_conditions_unmet": [1, 1, 0],
        "num_violated": [0, 1, 0],
        "median_slack_log10": [-0.5, -0.5, 2.0],
        "min_slack_log10": [-0.5, -2.0, 2.0],
    }


def test_only_theorems_that_fail_under_their_conditions_are_violations():
    kept = [line for line in LINES if not (line["checkpoint"] == "c" and line["kind"] == "untied")]
    assert num_violated(pd.DataFrame(LINES)) == 1
    assert num_violated(pd.DataFrame(kept)) == 0


def test_the_headline_counts_everything_once():
    assert bounds_headline(TABLE) == (
        "bounds: 4 of 8 hold, 3 fail (1 of them theorems whose conditions are met), "
        "1 undefined, 2 checkpoints without result"
    )
    assert bounds_headline(pd.DataFrame([line for line in LINES if line["holds"] == "yes"])) == (
        "bounds: 4 of 4 hold, 0 fail (0 of them theorems whose conditions are met)"
    )


def test_undefined_sides_have_no_slack_and_no_bounds_no_rows_and_no_headline():
    undefined = summarize_bounds(pd.DataFrame([check("a", "undefined", slack_log10=math.inf)]))
    assert undefined[["min_slack_log10", "median_slack_log10"]].isna().to_numpy().all()
    nothing = summarize_bounds(TABLE.head(0))
    assert nothing.empty
    assert dict(nothing.dtypes) == dict(undefined.dtypes)
    assert list(nothing.columns) == list(COLUMNS)
    assert bounds_headline(TABLE.head(0)) == ""


@pytest.mark.parametrize("kind", ["bool", "boolean", "object"])
def test_flags_may_have_any_type_that_tables_give_them(kind: str):
    lines = [line for line in LINES if line["holds"] != "missing"]
    table = pd.DataFrame(lines).astype({"is_theorem": kind, "conditions_met": kind})
    assert num_violated(table) == 1
    assert list(summarize_bounds(table)["num_violated"]) == [0, 1, 0]


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(METRICS, "layered", Layered)
    for seed in range(2):
        save_mlp(tmp_path / f"checkpoints/mlp{seed}", seed=seed)
    return write_manifest(
        tmp_path / "m.toml", samples=4, measurements='[[measurements]]\nmetric = "layered"\n'
    )


HEADLINE = "bounds: 6 of 10 hold, 2 fail (0 of them theorems whose conditions are met), 2 undefined"


def test_launch_report_and_status_say_how_many_hold(manifest: Path):
    run = manifest.parent / "run"
    for command in (("launch", manifest, "--run", run, "--on", "inline"), ("report", run)):
        answer = call(*command)
        assert answer.code == 0, answer.err
        assert answer.err.splitlines().count(HEADLINE) == 1
        assert HEADLINE not in answer.out
    answer = call("status", run)
    assert answer.code == 0
    assert answer.err.splitlines()[0] == f"{HEADLINE}, when last reduced"
    (run / "tables/bounds.parquet").unlink()
    assert "bounds" not in call("status", run).err


def test_theorems_that_fail_are_an_alarm_and_no_failure(manifest: Path):
    manifest.write_text(
        manifest.read_text().replace('"layered"', '"layered"\ntheorem_fails = true')
    )
    run = manifest.parent / "run"
    for command in (
        ("launch", manifest, "--run", run, "--on", "inline"), ("report", run), ("status", run),
    ):  # fmt: skip
        answer = call(*command)
        assert answer.code == 0, answer.err
        assert "4 of 10 hold, 4 fail (2 of them theorems whose conditions are met)" in answer.err
        (alarm,) = [line for line in answer.err.splitlines() if "a bug or a numerical" in line]
        assert alarm.startswith("2 checks of theorems failed although")
    _, _, asked = alarm.partition("See: flatcensus ")
    found = call(*asked.split(), "--json").records
    assert [line["checkpoint"] for line in found] == ["mlp0", "mlp1"]
    assert {line["kind"] for line in found} == {"untied"}


def test_layers_and_bounds_are_views_with_columns_that_fit_a_terminal(manifest: Path):
    run = manifest.parent / "run"
    call("launch", manifest, "--run", run, "--on", "inline")
    layers = call("query", run, "layers", "layer~HEA", "value>1")
    assert layers.out.split()[:4] == ["checkpoint", "series", "layer", "value"]
    assert [line.split()[2] for line in layers.out.splitlines()[1:]] == ["head", "head"]
    bounds = call("query", run, "bounds", "holds=undefined", "conditions_met=false")
    assert "0 is an input on 1 image" in bounds.out
    assert len(bounds.out.splitlines()) == 1 + 2
    sql = "select bound, count(*) as n from bounds where is_theorem group by bound order by bound"
    assert call("query", run, sql, "--json").records == [
        {"bound": "11", "n": 2}, {"bound": "12b", "n": 2}, {"bound": "48", "n": 4},
    ]  # fmt: skip


def test_runs_without_inequalities_have_no_headline(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/mlp0")
    path, run = write_manifest(tmp_path / "m.toml", samples=4), tmp_path / "run"
    for command in (("launch", path, "--run", run, "--on", "inline"), ("status", run)):
        assert "bounds" not in call(*command).err
    answer = call("query", run, "bounds")
    assert answer.code == 0
    assert answer.out.split()[:3] == ["checkpoint", "label", "bound"]
