"""Reducing is a pure function of the shards: nothing but their numbers can change a byte."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import files
from populations import Quiet, save_mlp, write_manifest
from synthetic import LAYERS, Layered

from pipeline.bounds_summary import summarize_bounds
from pipeline.errors import StoreError
from pipeline.memo import published_table
from pipeline.pack_file import joined
from pipeline.pack_reading import Group
from pipeline.reduce import (
    TABLE_SCHEMAS,
    planned_units,
    reduce_run,
    write_tables,
)
from pipeline.run import Run, execute, open_run, start_run
from pipeline.schema import Constants, Failure
from pipeline.shards import Found, Shard, decode_shard, encode_shard, list_shards, shard_key
from pipeline.unit_table import record_table
from pipeline.worker import Workbench, run_unit, write_failure
from tasks.block import Block
from tasks.measurement import Row, Status
from tasks.registry import METRICS

PAIR = """
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 4
target_relative_stderr = 1e-9
[[correlations]]
x = "normalized_mls"
y = "adaptive_sharpness"
[pair_plot]
"""
DETERMINISTIC = ("bounds", "correlations", "layers", "matrix", "measurements", "summary")
TABLES = (*DETERMINISTIC, "failures", "units")


def prepare(folder: Path, *, unit_seconds: float = 1e-6) -> Run:
    for seed in range(3):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    path = write_manifest(
        folder / "m.toml", samples=64, measurements=PAIR,
        resources=f"unit_seconds = {unit_seconds}\nbatch_size = 16",
    )  # fmt: skip
    return start_run(path, str(folder / "run"))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reduce")
    result = execute(prepare(folder), Quiet(), on="inline")
    assert result.failed == 0
    open_run(str(folder / "run")).reduce()
    return folder


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Run:
    shutil.copytree(original / "run", tmp_path / "run")
    return open_run(str(tmp_path / "run"))


def tables(run: Run, names: tuple[str, ...] = DETERMINISTIC) -> dict[str, bytes]:
    """The bytes of freshly reduced tables."""
    run.reduce()
    return {name: run.store.get(f"tables/{name}.parquet") for name in names}


def expected(original: Path, names: tuple[str, ...] = DETERMINISTIC) -> dict[str, bytes]:
    return {name: (original / f"run/tables/{name}.parquet").read_bytes() for name in names}


def test_reducing_again_gives_the_same_bytes_of_every_table(original: Path, copied: Run):
    assert tables(copied, TABLES) == expected(original, TABLES)
    assert tables(copied, TABLES) == expected(original, TABLES)


def test_the_order_of_shards_does_not_matter(original: Path, copied: Run):
    plan = copied.plan()
    units = planned_units(plan, copied.store)
    for key, found in units.items():
        shards = Group(*found).shards()
        random.Random(0).shuffle(shards)
        units[key] = together(shards)
    backwards = dict(reversed(units.items()))
    write_tables(reduce_run(copied.manifest, plan, backwards), copied.store)
    found = {n: copied.store.get(f"tables/{n}.parquet") for n in DETERMINISTIC}
    assert found == expected(original)


def together(shards: list[Shard]) -> Found:
    return Found(record_table(s.unit for s in shards), joined([s.table for s in shards]))


def test_overlapping_shards_that_differ_by_rounding_are_chosen_between_alike(copied: Run):
    """Other batch sizes round differently; which shard was listed first must not show."""
    plan = copied.plan()
    units = planned_units(plan, copied.store)
    key = plan.specs[0].spec.key
    shards = Group(*units[key]).shards()
    first = shards[0]
    rows = [
        Row(r["quantity"], r["value"] * (1 + 1e-7), sample=r["sample"])
        for r in first.table.to_pylist() if r["sample"] < 16
    ]  # fmt: skip
    unit = first.unit.model_copy(update={"stop": 16, "num_rows": len(rows)})
    constants = Constants(metric_version=1, code_version="x", torch_version="x")
    added = encode_shard(rows, unit, constants)
    shards.append(decode_shard(added, key=shard_key(unit.spec_key, unit.block)))
    units[key] = together(shards)
    forwards = reduce_run(copied.manifest, plan, units).measurements
    units[key] = together(shards[::-1])
    backwards = reduce_run(copied.manifest, plan, units).measurements
    pd.testing.assert_frame_equal(backwards, forwards)


def test_times_of_files_do_not_matter(original: Path, copied: Run):
    for index, path in enumerate(Path(copied.store.uri).rglob("*.parquet")):
        os.utime(path, (index, index))
    assert tables(copied, TABLES) == expected(original, TABLES)


def test_overlapping_shards_of_another_unit_size_do_not_matter(
    original: Path, copied: Run, tmp_path: Path
):
    """As when two launches with other unit_seconds wrote into one folder at the same time."""
    bench, before = Workbench(), list_shards(copied.store)
    big = prepare(tmp_path / "big", unit_seconds=100.0)
    for unit in big.plan().units:
        outcome = run_unit(dataclasses.replace(unit, store=copied.store.uri), bench)
        assert outcome.status == "committed", "the large units are not new"
    assert sum(map(len, list_shards(copied.store).values())) > sum(map(len, before.values()))
    assert tables(copied) == expected(original)


def test_duplicates_and_strangers_do_not_matter(original: Path, copied: Run):
    (_, names), *_ = list_shards(copied.store).items()
    data = copied.store.get(names[0].key)
    shard = decode_shard(data, key=names[0].key)
    # Results of settings that nobody asks for any more, and files that are no results.
    stranger = shard.unit.model_copy(update={"spec_key": "0" * 24})
    rows = [Row("mls", 1e9, sample=i) for i in range(stranger.num_rows)]
    constants = Constants(metric_version=1, code_version="x", torch_version="x")
    copied.store.put_new(
        shard_key("0" * 24, stranger.block), encode_shard(rows, stranger, constants)
    )
    (copied.store.path(names[0].key).parent / "0-32.parquet.bak").write_bytes(data)
    assert tables(copied, TABLES) == expected(original, TABLES)


def test_rows_beyond_the_final_stage_do_not_matter(original: Path, copied: Run):
    plan = copied.plan()
    for item in plan.specs:
        if item.spec.metric == "adaptive_sharpness":
            beyond = Block(range(64), range(4, 6))
            outcome = run_unit(_task(copied, item.spec, beyond), Workbench())
            assert outcome.status == "committed"
    assert tables(copied) == expected(original)


def test_failures_that_were_made_up_for_leave_no_trace_but_a_record(original: Path, copied: Run):
    spec = copied.plan().specs[0].spec
    failure = Failure(class_="transient", type="Broken", message="once")
    write_failure(copied.store, _task(copied, spec, Block(range(32))), failure)
    assert tables(copied) == expected(original)
    _, found = copied.reduce()
    assert len(found.failures) == 0
    (record,) = found.units[found.units["status"] == "failed"].to_dict("records")
    assert record["superseded"]


def _task(run: Run, spec, block: Block):
    from pipeline.specs import Task

    return Task(
        spec=spec, block=block, seed=0, store=run.store.uri, batch_size=16, threads=1,
        device="cpu", predicted_seconds=1.0,
    )  # fmt: skip


def test_a_damaged_shard_makes_its_spec_incomplete_and_no_other(original: Path, copied: Run):
    spec = copied.plan().specs[0].spec
    name = list_shards(copied.store, [spec.key])[spec.key][1]
    path = copied.store.path(name.key)
    path.write_bytes(path.read_bytes()[:-1])
    _, found = copied.reduce()
    status = found.summary.groupby(["checkpoint", "metric"])["status"].agg(set)
    assert status.pop((spec.checkpoint, spec.metric)) == {"incomplete"}
    assert not any("incomplete" in s for s in status)
    lines = found.summary[found.summary["status"] == "incomplete"]
    assert set(lines["num_missing"]) == {32}
    assert lines["value"].isna().all()
    assert set(found.correlations.query("group == 'all'")["n_missing"]) == {1}


def test_every_row_of_a_finished_run_is_there_once(original: Path):
    rows = pd.read_parquet(original / "run/tables/measurements.parquet")
    assert not rows.duplicated(["checkpoint", "series", "sample", "draw"]).any()
    counts = rows.groupby("series").size()
    assert dict(counts) == {
        "adaptive_sharpness": 3 * 64 * 4, "mls": 3 * 64, "normalized_mls": 3 * 64,
        "squared_error": 3 * 64,
    }  # fmt: skip


def test_tables_hold_no_time_host_or_version_where_numbers_are(original: Path):
    for name in DETERMINISTIC:
        columns = set(pd.read_parquet(original / f"run/tables/{name}.parquet").columns)
        assert not columns & {"seconds", "host", "pid", "started_at", "code_version", "attempt"}


def test_an_estimate_is_the_mean_of_its_rows(original: Path):
    rows = pd.read_parquet(original / "run/tables/measurements.parquet")
    summary = pd.read_parquet(original / "run/tables/summary.parquet")
    means = rows[rows["series"] == "normalized_mls"].groupby("checkpoint")["value"].mean()
    found = summary[summary["series"] == "normalized_mls"].set_index("checkpoint")["value"]
    pd.testing.assert_series_equal(found, means, rtol=1e-12, check_exact=False)


def test_names_are_those_of_the_manifest_now(original: Path, copied: Run, tmp_path: Path):
    shutil.copytree(original / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/mlp0").rename(tmp_path / "checkpoints/renamed")
    shutil.copy(original / "m.toml", tmp_path / "m.toml")
    run = start_run(tmp_path / "m.toml", copied.store.uri)
    assert not run.plan().units
    execute(run, Quiet(), on="inline")
    _, found = run.reduce()
    assert set(found.summary["checkpoint"]) == {"renamed", "mlp1", "mlp2"}
    assert set(found.measurements["checkpoint"]) == {"renamed", "mlp1", "mlp2"}


def test_checkpoints_that_are_gone_are_failed_rows_of_every_series(tmp_path: Path, original: Path):
    shutil.copytree(original / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(original / "m.toml", tmp_path / "m.toml")
    shutil.copytree(original / "run", tmp_path / "run")
    execute(start_run(tmp_path / "m.toml", str(tmp_path / "run")), Quiet(), on="inline")
    shutil.rmtree(tmp_path / "checkpoints/mlp1")
    run = open_run(str(tmp_path / "run"))
    execute(run, Quiet(), on="inline")
    _, found = run.reduce()
    gone = found.summary[found.summary["checkpoint"] == "mlp1"]
    assert set(gone["series"]) == {
        "normalized_mls", "mls", "adaptive_sharpness", "squared_error",
    }  # fmt: skip
    assert set(gone["status"]) == {"failed"}
    assert set(gone["num_missing"]) == {64}
    (failure,) = found.failures.to_dict("records")
    assert (failure["checkpoint"], failure["failure_class"]) == ("mlp1", "unresolved")
    assert "config.json: not found" in failure["failure_message"]
    assert set(found.correlations.query("group == 'all'")["n_missing"]) == {1}


def test_a_run_without_any_result_has_tables_of_the_same_columns(tmp_path: Path, original: Path):
    run = prepare(tmp_path)
    plan = run.plan()
    found = reduce_run(run.manifest, plan, {})
    assert set(found.summary["status"]) == {"incomplete"}
    assert set(found.summary["num_missing"]) == {64}
    assert len(found.units) == len(found.failures) == 0
    for name in TABLES:
        kept = pd.read_parquet(original / f"run/tables/{name}.parquet").columns
        assert list(getattr(found, name).columns) == list(kept), name


def test_a_value_that_is_not_finite_is_not_left_out_of_the_mean(copied: Run):
    spec = copied.plan().specs[0].spec
    name = list_shards(copied.store, [spec.key])[spec.key][0]
    shard = decode_shard(copied.store.get(name.key), key=name.key)
    rows = [
        Row(r["quantity"], np.nan if r["sample"] == 3 else r["value"], sample=r["sample"],
            status=Status.NOT_FINITE if r["sample"] == 3 else Status.OK)
        for r in shard.table.to_pylist()
    ]  # fmt: skip
    constants = Constants(metric_version=1, code_version="x", torch_version="x")
    copied.store.path(name.key).unlink()
    copied.store.put_new(name.key, encode_shard(rows, shard.unit, constants))
    _, found = copied.reduce()
    line = found.summary[
        (found.summary["checkpoint"] == spec.checkpoint)
        & (found.summary["series"] == "normalized_mls")
    ].iloc[0]
    assert line["status"] == "not_finite"
    assert np.isnan(line["value"])
    assert set(found.correlations.query("group == 'all'")["n_missing"]) == {1}


def test_publishing_replaces_each_table_in_one_step_and_leaves_nothing_else(copied: Run):
    folder = Path(copied.store.uri) / "tables"
    (folder / "summary.parquet").write_bytes(b"old")
    copied.reduce()
    assert set(files(folder)) == {"memo.json", *(f"{name}.parquet" for name in TABLES)}


TWINS = """
[[measurements]]
metric = "adaptive_sharpness"
label = "loose"
max_draws = 4
target_relative_stderr = 1e9
[[measurements]]
metric = "adaptive_sharpness"
label = "tight"
max_draws = 4
target_relative_stderr = 1e-9
"""


@pytest.fixture
def twins(tmp_path: Path) -> Run:
    save_mlp(tmp_path / "checkpoints/mlp0")
    manifest = write_manifest(tmp_path / "m.toml", samples=16, measurements=TWINS)
    run = start_run(manifest, str(tmp_path / "run"))
    execute(run, Quiet(), on="inline")
    return run


def sharpness(run: Run) -> pd.DataFrame:
    _, found = run.reduce()
    return found.summary.query("quantity == 'adaptive_sharpness'").set_index("label")


def test_twins_that_differ_in_their_target_stop_by_their_own(twins: Run):
    assert dict(sharpness(twins)["num_rows"]) == {"loose": 16 * 2, "tight": 16 * 4}


def test_no_stopping_decision_rests_on_what_a_damaged_shard_left(twins: Run):
    first = twins.store.path(list_shards(twins.store).popitem()[1][0].key)
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    found = sharpness(twins)
    assert set(found["status"]) == {"incomplete"}
    assert found["value"].isna().all()


LAYERED = """
[[measurements]]
metric = "layered"
[[measurements]]
metric = "normalized_mls"
[[correlations]]
x = "size"
y = "mls"
"""


@pytest.fixture
def layered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Two sound networks and one that cannot be measured."""
    monkeypatch.setitem(METRICS, "layered", Layered)
    for seed in range(2):
        save_mlp(tmp_path / f"checkpoints/mlp{seed}", seed=seed)
    save_mlp(tmp_path / "checkpoints/sick", change=lambda m: next(m.parameters()).fill_(np.nan))
    manifest = write_manifest(tmp_path / "m.toml", samples=8, measurements=LAYERED)
    run = start_run(manifest, str(tmp_path / "run"))
    result = execute(run, Quiet(), on="inline")
    assert result.failed == 2
    return run


def test_layers_have_a_table_of_their_own_and_the_summary_one_line_per_series(layered: Run):
    _, found = layered.reduce()
    assert len(found.summary) == 3 * 3
    assert not found.summary.duplicated(["checkpoint", "series"]).any()
    assert "layer_size" not in set(found.summary["quantity"])
    lines = found.layers[found.layers["checkpoint"] == "mlp1"].set_index("layer")
    assert list(lines.index) == list(LAYERS)
    assert set(lines["series"]) == {"layer_size"}
    assert list(lines["value"]) == [10 * 3.5, 20 * 3.5]
    assert list(lines["stderr"]) == [0.1, 0.2]
    assert list(lines["ci_high"] - lines["value"]) == [1, 2]
    assert set(lines["num_samples"]) == {8}
    assert set(lines["status"]) == {"ok"}
    assert set(found.correlations.query("group == 'all'")["n_missing"]) == {1}


def test_checks_are_lines_with_both_sides(layered: Run):
    _, found = layered.reduce()
    lines = found.bounds[found.bounds["checkpoint"] == "mlp0"]
    assert list(lines["bound"]) == ["11", "11", "12b", "48", "48"]
    assert list(lines["holds"]) == ["no", "yes", "undefined", "yes", "yes"]
    np.testing.assert_allclose(lines["slack_log10"], [-1, 1, np.nan, 2, 2], rtol=1e-12)
    assert list(lines["layer"].fillna("")) == ["", "", "", *LAYERS]
    assert list(lines["conditions_met"]) == [True, True, False, True, True]
    assert set(lines["num_samples"]) == {8}
    counts = summarize_bounds(found.bounds)
    assert list(counts["num_checkpoints"]) == [2] * 4
    assert list(counts["num_missing"]) == [1] * 4


@pytest.mark.parametrize("state", ["failed", "incomplete", "absent"])
def test_what_has_no_result_is_told_in_layers_and_bounds(layered: Run, state: str):
    run, name = layered, "sick"
    if state == "incomplete":
        (spec,) = [
            i.spec
            for i in run.plan().specs
            if (i.spec.checkpoint, i.spec.metric) == ("mlp0", "layered")
        ]
        run.store.path(list_shards(run.store, [spec.key])[spec.key][0].key).unlink()
        name = "mlp0"
    if state == "absent":
        shutil.rmtree(Path(run.store.uri).parent / "checkpoints/sick")
        execute(run, Quiet(), on="inline")
    _, found = run.reduce()
    (reason,) = set(
        found.summary.query("checkpoint == @name and metric == 'layered'")["status_text"]
    )
    (layer,) = found.layers[found.layers["checkpoint"] == name].to_dict("records")
    assert (layer["series"], layer["status"]) == (
        "layer_size", "incomplete" if state == "incomplete" else "failed",
    )  # fmt: skip
    assert pd.isna(layer["layer"])
    assert np.isnan(layer["value"])
    assert layer["num_missing"] == 8
    (bound,) = found.bounds[found.bounds["checkpoint"] == name].to_dict("records")
    assert (bound["holds"], bound["bound"], bound["conditions"]) == ("missing", "", reason)
    assert pd.isna(bound["is_theorem"])
    assert {"failed": "hold NaN or infinity", "incomplete": "flatcensus resume",
            "absent": "config.json: not found"}[state] in reason  # fmt: skip


def test_layers_and_bounds_are_the_same_bytes_again_and_read_back(layered: Run):
    names = ("layers", "bounds")
    first = tables(layered, names)
    assert tables(layered, names) == first
    _, found = layered.reduce(publish=False)
    for name in names:
        kept = published_table(layered.store, name)
        assert pa.Table.from_pandas(kept, schema=TABLE_SCHEMAS[name], preserve_index=False).equals(
            found.arrow()[name]
        )


def test_tables_without_lines_keep_their_types(copied: Run):
    copied.reduce()
    for name in ("layers", "bounds"):
        kept = pq.read_table(copied.store.path(f"tables/{name}.parquet"))
        assert kept.num_rows == 0
        assert kept.schema.equals(TABLE_SCHEMAS[name])


def test_a_published_table_that_cannot_be_read_names_what_writes_it_again(copied: Run):
    path = copied.store.path("tables/bounds.parquet")
    kept = published_table(copied.store, "bounds")
    assert kept is not None
    assert kept.empty
    for damaged in (b"x", path.read_bytes()[:-9], copied.store.get("tables/summary.parquet")):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"bounds.parquet cannot be read .* flatcensus report"):
            published_table(copied.store, "bounds")
    path.unlink()
    assert published_table(copied.store, "bounds") is None
