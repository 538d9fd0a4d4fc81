"""Every benchmark runs and says something finite. Nothing here looks at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from benchmarks import __main__ as program
from benchmarks import (
    bench_adaptive_sharpness,
    bench_cost,
    bench_engine,
    bench_jacobian,
    bench_layers,
    bench_mls,
    bench_precision,
    bench_scale,
    goals,
    networks,
    simulate,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return networks.trained_checkpoints(folder, "digits", steps=60)[0]


def check(rows: list[dict], *, may_be_nan: tuple[str, ...] = ()) -> None:
    assert rows
    for row in rows:
        bad = [k for k, v in row.items() if not isinstance(v, str) and not math.isfinite(v)]
        assert set(bad) <= set(may_be_nan), f"{bad} of {row}"


def check_goals(found: list[goals.Goal], number: int) -> None:
    assert len(found) == number
    for goal in found:
        assert goal.measured
        assert all(map(math.isfinite, goal.measured)), goal
        assert goal.shown


def test_sensitivity_benchmark_compares_every_method_with_the_truth(checkpoint, monkeypatch):
    monkeypatch.setattr(bench_mls, "NUM_IMAGES", 2)
    monkeypatch.setattr(bench_mls, "REPEATS", 1)
    rows = bench_mls.run([checkpoint], "digits")
    check(rows, may_be_nan=("certified_width",))
    certified = next(row for row in rows if row["method"] == goals.CERTIFIED)
    assert certified["max_error"] <= certified["certified_width"] <= 1e-3
    assert all(row["forward_equivalents"] > 0 for row in rows)
    check_goals(goals.sensitivity_goals(rows), 6)
    assert bench_mls.table(rows).row_count == len(rows)


def test_jacobian_benchmark_compares_probes_with_all_rows(monkeypatch):
    for name, value in {
        "IMAGE_SIZE": 32, "NUM_OUTPUTS": 100, "NUM_IMAGES": 2, "TRAINING_STEPS": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_jacobian, name, value)
    rows = bench_jacobian.run()
    check(rows)
    for row in rows:
        assert row["max_error"] < (0.1 if row["probes"] else 1e-3)
        assert row["stated_max"] <= 0.02 * 2**0.5
    check_goals(goals.jacobian_goals(rows), 2)
    assert bench_jacobian.table(rows).row_count == len(rows)


def test_layer_benchmark_compares_rows_and_their_singular_values(monkeypatch):
    for name, value in {
        "IMAGE_SIZE": 32, "NUM_OUTPUTS": 250, "NUM_COTANGENTS": 16, "REPEATS": 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_layers, name, value)
    rows = bench_layers.run()
    check(rows)
    assert [row["rows"] for row in rows] == [250, 192, 16, 16]
    assert all(row["error"] < 1e-5 for row in rows)
    check_goals(goals.layer_goals(rows), 2)
    assert bench_layers.table(rows).row_count == len(rows)


def test_sharpness_benchmark_answers_both_questions_at_every_rho(checkpoint, monkeypatch):
    for name, value in {
        "PILOT_IMAGES": 64, "RECIPE_IMAGES": 10, "RECIPE_DRAWS": 4, "RECIPE_FORWARDS": 50,
        "FIXED_DRAWS": 3, "RESAMPLES": 3,
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_adaptive_sharpness, name, value)
    rows = bench_adaptive_sharpness.run([checkpoint], "digits")
    check(rows)
    assert {(row["question"], row["rho"]) for row in rows} == {
        ("population", 0.1), ("population", 0.03),
        ("fixed images", 0.1), ("fixed images", 0.03), ("fixed images", 0.01),
    }  # fmt: skip
    check_goals(goals.sharpness_goals(rows), 11)
    assert bench_adaptive_sharpness.table(rows).row_count == len(rows)


@pytest.mark.ray
def test_precision_benchmark_compares_with_float64_and_prints_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_precision, "DRAWS", 2)
    rows = bench_precision.run(tmp_path, most=2)
    half = tuple(key for key in rows[0] if key.endswith(("f16", "f16_image")))
    check(rows, may_be_nan=half)
    assert all(row["held"] for row in rows)
    assert all(row["sigma"] < row["sigma_bf16"] for row in rows)
    check_goals(goals.precision_goals(rows), 3)
    lines = bench_precision.markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows) == 2 + bench_precision.table(rows).row_count


def test_engine_benchmark_measures_both_executors(monkeypatch):
    rows = bench_engine.run(units=6, checkpoints=(1, 2))
    check(rows)
    assert [(row["executor"], row["checkpoints"], row["units"]) for row in rows] == [
        ("inline", 1, 6), ("inline", 2, 6), ("local", 1, 6), ("local", 2, 6),
    ]  # fmt: skip
    check_goals(goals.engine_goals(rows), 4)
    assert len(bench_engine.table(rows).columns) == 1 + len(rows)


def test_scale_benchmark_plans_launches_reads_kills_and_resumes():
    rows = bench_scale.run({"inline": (20,)}, {"2 specs": (2, 1, 10, 2)})
    check(rows)
    plan, launch = rows
    assert (plan["part"], plan["units"]) == ("plan", 40)
    assert (launch["part"], launch["units"]) == ("launch", 20)
    steps = ("imports", "resolving", "planning", "slots", "first_unit")
    assert launch["restart"] == pytest.approx(sum(launch[f"restart_{step}"] for step in steps))
    check_goals(goals.scale_goals(rows), 6)
    more = {**launch, "units": 200, "launch": 10 * launch["launch"]}
    assert bench_scale.growth([*rows, more], "launch") == pytest.approx(1.0)
    assert len(bench_scale.table(rows).columns) == 1 + len(rows)


def test_simulated_launches_end_and_lose_what_they_must():
    plan = simulate.census(20)
    calm, rough = (
        simulate.simulate(plan, simulate.Cluster(32, hours_between_losses=hours))
        for hours in (0.0, 0.05)
    )
    assert 0.1 < calm["utilisation"] < 1.5  # of predicted seconds, which the drawn ones are not
    assert calm["lost_units"] == calm["lost"] == 0
    assert rough["lost_units"] > 0
    assert rough["makespan"] > calm["makespan"] > calm["ideal"] * 0.5
    assert (
        simulate.simulate(plan, simulate.Cluster(32, hours_between_losses=0.05))["makespan"]
        == rough["makespan"]
    ), "the seed decides"
    assert simulate.table([{"samples": 20, "unit_seconds": 60.0, **calm}]).row_count == 1


def test_report_has_every_goal_beside_what_was_measured(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_mls, "NUM_IMAGES", 2)
    monkeypatch.setattr(bench_mls, "REPEATS", 1)
    (tmp_path / "checkpoints").symlink_to(checkpoint.parent)
    output = tmp_path / "bench.json"
    command = ["--run", tmp_path, "--dataset", "digits", "--only", "mls", "--markdown",
               "--output", output]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["benchmarks", *map(str, command)])
    program.main()
    report = json.loads(output.read_text())
    assert len(report["checkpoints"]) == 3
    lines = capsys.readouterr().out.splitlines()
    for goal in report["goals"]:
        assert len(goal["measured"]) == 3
        assert goal["met"] in (True, False)
        assert sum(goal["what"] in line for line in lines) == 1
    assert "torch" in lines[-1]


def test_goals_are_met_by_the_worst_network():
    at_least = goals.Goal("s", "w", ">=", 2.0, (1.9, 5.0), "")
    at_most = goals.Goal("s", "w", "<=", 2.0, (1.9, 2.0), "", " s")
    assert (at_least.met, at_least.shown) == (False, "1.9–5")
    assert (at_most.met, at_most.shown) == (True, "1.9–2 s")


def test_a_run_folder_gives_its_first_middle_and_last_checkpoint(tmp_path: Path):
    assert networks.checkpoints_of(tmp_path) == []
    for name in "edcba":
        (tmp_path / f"checkpoints/{name}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{name}/config.json").touch()
    assert [path.name for path in networks.checkpoints_of(tmp_path)] == ["a", "c", "e"]


def test_cost_benchmark_predicts_each_architecture_from_the_others(monkeypatch):
    monkeypatch.setattr(bench_cost, "REPEATS", 1)
    monkeypatch.setitem(bench_cost.ARCHITECTURES, "vit_tiny_patch16_224", (32, True))
    rows = bench_cost.run(["vit_tiny_patch16_224", "mobilevitv2_050"])
    check(rows, may_be_nan=("memory_ratio",))
    assert len(rows) == 4
    assert all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows)
    check_goals(goals.cost_goals(rows), 1)
    assert bench_cost.table(rows).row_count == len(rows)
