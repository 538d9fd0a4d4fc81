"""The plan: exactly what is missing, cut alike whatever was done before, each with its reason."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from commands import call
from hypothesis import given, settings
from hypothesis import strategies as st
from populations import DATA_CONFIG, MLP_ARGS, Quiet, save_mlp, write_manifest
from synthetic import Layered

from pipeline.calibration import MAX_RECORDS, finished_units
from pipeline.cost import nominal_rates
from pipeline.coverage import missing_blocks
from pipeline.decisions import DECISIONS, recall_decisions
from pipeline.device_classes import device_class
from pipeline.entries import DataSpec, MeasurementEntry
from pipeline.grid import split
from pipeline.known_specs import SPEC_FOLDER, stale_lines, write_specs
from pipeline.manifest import ResourceSpec
from pipeline.plan import make_plan
from pipeline.progress import numbered_notes, plan_standing, plan_table
from pipeline.resolve import resolve
from pipeline.run import Run, execute, start_run
from pipeline.shards import list_shards, shard_key
from pipeline.specs import Spec
from pipeline.tables import stage_columns
from pipeline.units import Terms, UnitGroup, Units, unit_size
from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.block import Block
from tasks.outline import outline_architecture
from tasks.registry import METRICS

MLS = '[[measurements]]\nmetric = "normalized_mls"\n'
SHARPNESS = '[[measurements]]\nmetric = "adaptive_sharpness"\n'
UNREACHABLE = SHARPNESS + "target_relative_stderr = 1e-9\nmax_draws = {draws}\n"

blocks = st.builds(
    lambda a, b, c, d: Block(range(a, a + b), range(c, c + d)),
    st.integers(0, 60), st.integers(1, 40), st.integers(0, 6), st.integers(1, 4),
)  # fmt: skip


RATES = nominal_rates(device_class("cpu", num_gpus=0))
SHARPNESS_SPEC = Spec(
    key="k", kind="measure", checkpoint="c", family="f", tag="", metric="adaptive_sharpness",
    label="", fields={}, ref=None, entry=MeasurementEntry(AdaptiveSharpness(), ""), train=None,
    data=DataSpec(name="digits"), data_identity="d", available=64, num_samples=64,
    network=outline_architecture("flatcensus_mlp", MLP_ARGS, DATA_CONFIG),
)  # fmt: skip


def pairs(found) -> list[tuple[int, int]]:
    return [p for block in found for p in itertools.product(block.samples, block.draws)]


def spec_like(alignment: int) -> Any:
    return SimpleNamespace(alignment=alignment, entry=object())


def prepare(folder: Path, *, networks: int = 1, **options: Any) -> Run:
    for seed in range(networks):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    return start_run(write_manifest(folder / "m.toml", **options), str(folder / "run"))


def done(run: Run) -> Run:
    result = execute(run, Quiet(), on="inline")
    assert result.failed == 0
    return run


@settings(max_examples=200, deadline=None)
@given(
    st.lists(blocks, max_size=6), st.integers(1, 64), st.integers(1, 6), st.integers(1, 300)
)  # fmt: skip
def test_units_tile_exactly_what_is_missing(have, samples, draws, size):
    wanted = Block(range(samples), range(draws))
    units = [u for gap in missing_blocks(wanted, have) for u in split(gap, size, wanted)]
    found = pairs(units)
    assert len(found) == len(set(found)), "a pair is done twice"
    assert set(found) == set(pairs([wanted])) - set(pairs(have))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(blocks, max_size=6), st.integers(1, 64), st.integers(1, 6), st.integers(1, 300)
)  # fmt: skip
def test_a_group_knows_what_its_units_add_up_to_without_making_them(have, samples, draws, size):
    wanted = Block(range(samples), range(draws))
    terms = Terms(seed=0, store="run", resources=ResourceSpec(), rates=RATES)
    gaps = tuple(missing_blocks(wanted, have))
    group = UnitGroup(SHARPNESS_SPEC, gaps, wanted, size, terms, generation=2, predicted_bytes=9)
    units = list(group)
    assert len(group) == len(units) == len(Units((group,)))
    seconds = [unit.predicted_seconds for unit in units]
    assert group.predicted_seconds == pytest.approx(sum(seconds), rel=1e-12)
    assert group.longest_seconds == max(seconds, default=0.0)
    for unit in units:
        assert unit.predicted_seconds == terms.seconds(
            SHARPNESS_SPEC, len(unit.block.samples), len(unit.block.draws)
        )
        assert (unit.generation, unit.predicted_bytes) == (2, 9)


def test_units_are_counted_over_their_groups_in_order():
    terms = Terms(seed=0, store="run", resources=ResourceSpec(), rates=RATES)
    parts = [Block(range(5)), Block(range(5, 6)), Block(range(6, 12))]
    groups = [UnitGroup(SHARPNESS_SPEC, (b,), Block(range(12)), 2, terms) for b in parts]
    units = Units(tuple(groups))
    assert len(units) == len(list(units)) == 7
    assert [units[i] for i in range(7)] == list(units)
    with pytest.raises(IndexError, match="only 7 units"):
        units[7]
    assert not Units()
    million = UnitGroup(SHARPNESS_SPEC, (whole := Block(range(10**12)),), whole, 2, terms)
    assert len(million) == 5 * 10**11
    assert next(iter(million)).block == Block(range(2))


@settings(max_examples=100, deadline=None)
@given(
    alignment=st.sampled_from([1, 4, 8, 10, 32]),
    batch=st.integers(1, 64),
    seconds=st.floats(1e-3, 1e3),
    per_index=st.floats(1e-4, 1.0),
)
def test_units_are_whole_groups_and_whole_batches_of_about_the_wanted_time(
    alignment: int, batch: int, seconds: float, per_index: float
):
    resources = ResourceSpec(batch_size=batch, unit_seconds=seconds)
    size = unit_size(spec_like(alignment), per_index, resources)
    whole = math.lcm(alignment, batch)
    assert size % alignment == 0
    assert size * per_index <= seconds * (1 + 1e-9) or size == alignment
    if whole * per_index <= seconds * (1 - 1e-9):
        assert size % whole == 0
        assert (size + whole) * per_index > seconds * (1 - 1e-9)
    else:
        assert whole % size == 0, "a unit would lie in two batches"
        larger = [n for n in range(size + alignment, whole, alignment) if whole % n == 0]
        assert all(n * per_index > seconds * (1 - 1e-9) for n in larger)


@pytest.mark.parametrize(
    ("per_index", "alignment", "expected"),
    [
        (1.0, 1, 32), (1.9, 1, 16), (9.0, 1, 4), (61.0, 1, 1), (1e4, 1, 1), (1e4, 8, 8),
        (1e4, 32, 32), (0.05, 1, 1184), (2.0, 8, 16), (7.0, 8, 8),
    ],
)  # fmt: skip
def test_expensive_samples_make_units_smaller_than_a_batch(
    per_index: float, alignment: int, expected: int
):
    """60 seconds by default; a batch of 32 images of a minute each would be half an hour."""
    assert unit_size(spec_like(alignment), per_index, ResourceSpec()) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 16), st.sampled_from([8, 16, 32]), st.integers(1, 12))
def test_no_unit_boundary_lies_inside_a_group(samples, draws, alignment, multiple):
    wanted, size = Block(range(samples), range(draws)), alignment * multiple
    for unit in split(wanted, size, wanted):
        assert unit.samples.start % alignment == 0
        assert unit.samples.stop % alignment == 0 or unit.samples.stop == samples


@settings(max_examples=100, deadline=None)
@given(st.lists(blocks, max_size=4), st.integers(8, 64), st.integers(1, 200))
def test_gaps_are_cut_on_the_same_grid_as_the_whole(have, samples, size):
    """So a resumed run asks for the units that the first one would have done."""
    wanted = Block(range(samples), range(4))

    def edges(block: Block) -> set[int]:
        return {u.samples.start for u in split(block, size, wanted)} - {block.samples.start}

    grid = edges(wanted)
    for gap in missing_blocks(wanted, have):
        assert edges(gap) <= grid


def test_a_first_plan_wants_everything_once_and_says_why(tmp_path: Path):
    run = prepare(tmp_path, networks=2, samples=64, resources="unit_seconds = 1e-6\nbatch_size = 8")
    plan = run.plan()
    assert [(u.spec.checkpoint, u.block) for u in plan.units] == [
        (name, Block(samples))
        for name in ("mlp0", "mlp1")
        for samples in (range(32), range(32, 64))
    ]
    table = plan_table(plan)
    assert list(table["units"]) == [2, 2]
    assert set(table["state"]) == {"todo"}
    assert set(table["reason"]) == {"no result with these settings"}
    assert table["seconds"].sum() == pytest.approx(plan.predicted_seconds, abs=0.2)


@pytest.fixture
def layered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "layered", Layered)


EXPENSIVE = '[[measurements]]\nmetric = "layered"\ncost = {cost}\n'


@pytest.mark.usefixtures("layered")
def test_units_of_expensive_samples_cover_what_large_ones_do_and_give_the_same(tmp_path: Path):
    cheap = prepare(tmp_path / "cheap", samples=20, measurements=EXPENSIVE.format(cost=1.0))
    costly = prepare(tmp_path / "costly", samples=20, measurements=EXPENSIVE.format(cost=1e9))
    assert [u.block.samples for u in cheap.plan().units] == [range(20)]
    assert [u.block.samples for u in costly.plan().units] == [range(i, i + 1) for i in range(20)]
    _, few = done(cheap).reduce()
    _, many = done(costly).reduce()
    pd.testing.assert_frame_equal(many.measurements, few.measurements)
    pd.testing.assert_frame_equal(many.layers, few.layers)


def test_parts_of_batches_change_rounding_only(tmp_path: Path):
    """The finest cut that ``normalized_mls`` allows is 32 samples, here of batches of 64."""
    fine = prepare(tmp_path / "fine", samples=64, resources="unit_seconds = 1e-6\nbatch_size = 64")
    whole = prepare(tmp_path / "whole", samples=64, resources="batch_size = 64")
    assert [len(u.block.samples) for u in fine.plan().units] == [32, 32]
    assert [len(u.block.samples) for u in whole.plan().units] == [64]
    _, one = done(fine).reduce()
    _, other = done(whole).reduce()
    assert list(one.measurements["sample"]) == list(other.measurements["sample"])
    found, expected = one.measurements["value"], other.measurements["value"]
    # Lanczos stops at a relative width of 1e-3, squared in normalized_mls.
    np.testing.assert_allclose(found, expected, rtol=2e-3)


@pytest.mark.usefixtures("layered")
def test_equal_notes_are_told_once_and_finished_checkpoints_need_none(tmp_path: Path):
    twins = '[[measurements]]\nmetric = "layered"\n'
    twins += twins + 'label = "twin"\ntheorem_fails = true\n'
    run = prepare(tmp_path, networks=3, samples=4, measurements=twins + MLS)
    table, notes = numbered_notes(plan_table(run.plan()))
    assert list(table["note"]) == ["1", "2", ""] * 3
    assert notes == [
        "note 1 (layered, 3 checkpoints): 10 rows at once",
        "note 2 (layered@twin, 3 checkpoints): 10 rows at once",
    ]
    folder = tmp_path / "run"
    answer = call("plan", tmp_path / "m.toml", "--run", folder)
    assert answer.err.count("10 rows at once") == 2
    assert "rows at once" not in answer.out
    *records, last = call("plan", tmp_path / "m.toml", "--run", folder, "--json").records
    assert last["totals"]["units"] == 9
    assert [r["note"] for r in records] == ["10 rows at once", "10 rows at once", ""] * 3
    done(run)
    table, notes = numbered_notes(plan_table(run.plan()))
    assert (list(table.columns)[-1], notes) == ("reason", [])


def test_other_unit_sizes_recompute_nothing_that_is_there(tmp_path: Path):
    run = prepare(tmp_path, samples=96, resources="unit_seconds = 1e-6")
    done(run)
    shards = list_shards(run.store)
    victim = next(iter(shards.values()))[1]
    run.store.path(victim.key).unlink()
    again = prepare(tmp_path, samples=96, resources="unit_seconds = 100.0\nbatch_size = 64")
    (unit,) = again.plan().units
    assert unit.block == victim.block
    done(again)
    assert not again.plan().units
    assert list_shards(again.store) == shards


def test_more_samples_add_only_what_is_new_and_fewer_ask_for_nothing(tmp_path: Path):
    done(prepare(tmp_path, samples=40))
    grown = prepare(tmp_path, samples=70)
    assert [u.block.samples for u in grown.plan().units] == [range(40, 70)]
    (line,) = plan_table(grown.plan())["reason"]
    assert line == "some samples missing"
    assert not prepare(tmp_path, samples=10).plan().units
    _, tables = prepare(tmp_path, samples=10).reduce()
    assert set(tables.summary["num_samples"]) == {10}


def test_stages_advance_only_on_complete_rows(tmp_path: Path):
    run = prepare(
        tmp_path, samples=16, measurements=UNREACHABLE.format(draws=8),
        resources="unit_seconds = 1e-6\nbatch_size = 8",
    )  # fmt: skip
    first = run.plan()
    assert pairs(u.block for u in first.units) == pairs(
        Block(range(8 * i, 8 * i + 8), range(d, d + 1)) for d in range(2) for i in range(2)
    )
    done(run)
    (spec,) = run.plan().specs
    assert (spec.stage, spec.wanted) == (2, Block(range(16), range(8)))
    # Without one unit of the first look, later ones are not looked at, although they are there.
    run.store.path(shard_key(spec.spec.key, Block(range(8), range(1)))).unlink()
    (spec,) = (plan := run.plan()).specs
    assert (spec.stage, spec.wanted) == (0, Block(range(16), range(2)))
    assert [u.block for u in plan.units] == [Block(range(8), range(1))]
    done(run)
    assert run.plan().specs[0].stage == 2


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(tmp_path: Path):
    small = prepare(tmp_path, samples=16, measurements=UNREACHABLE.format(draws=4))
    done(small)
    _, tables = small.reduce()
    large = prepare(tmp_path, samples=16, measurements=UNREACHABLE.format(draws=8))
    assert [u.block.draws for u in large.plan().units] == [range(4, 8)]
    assert large.plan().specs[0].reason == "error bar above its target after look 2"
    done(large)
    _, again = prepare(tmp_path, samples=16, measurements=UNREACHABLE.format(draws=4)).reduce()
    assert again.summary.equals(tables.summary), "rows beyond the budget were used"


def test_equal_networks_and_twins_of_coverage_share_their_units(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/a", seed=0)
    shutil.copytree(tmp_path / "checkpoints/a", tmp_path / "checkpoints/b")
    twins = UNREACHABLE.format(draws=2) + UNREACHABLE.format(draws=4) + 'label = "long"\n'
    path = write_manifest(tmp_path / "m.toml", samples=16, measurements=twins)
    run = start_run(path, str(tmp_path / "run"))
    found = pairs(u.block for u in run.plan().units)
    assert len(found) == len(set(found)) == 16 * 2
    done(run)
    (key,) = list_shards(run.store)
    assert {s.spec.key for s in run.plan().specs} == {key}
    _, tables = run.reduce()
    values = tables.summary.pivot(index="checkpoint", columns="series", values="value")
    assert (values.loc["a"] == values.loc["b"]).all()
    rows = tables.summary.set_index(["checkpoint", "series"])["num_rows"]
    assert rows["a", "adaptive_sharpness"] * 2 == rows["b", "adaptive_sharpness@long"] == 16 * 4


def test_failed_blocks_are_done_again_only_on_request(tmp_path: Path):
    from pipeline.schema import Failure
    from pipeline.worker import write_failure

    run = prepare(tmp_path, samples=64, resources="unit_seconds = 1e-6")
    first, second = run.plan().units
    failure = Failure(class_="permanent", type="Broken", message="on purpose")
    write_failure(run.store, first, failure)
    plan = run.plan()
    assert [u.block for u in plan.units] == [second.block]
    (item,) = plan.specs
    assert (item.state, item.failed) == ("todo", (first.block,))
    assert item.reason == "failed before; `flatcensus resume` tries again"
    assert plan.num_failed == 1

    again = make_plan(run.manifest, run.store, retry_failed=True)
    assert [u.block for u in again.units] == [first.block, second.block]
    assert again.units[0].generation == 1, "a second failure needs a name of its own"
    done(run)
    assert run.plan().specs[0].state == "failed"
    assert plan_standing(run.plan()).lines()[0]["failed"] == 1
    execute(run, Quiet(), on="inline", retry_failed=True)
    assert run.plan().specs[0].state == "done"


def test_a_failure_of_part_of_a_range_leaves_the_rest_to_do(tmp_path: Path):
    from pipeline.schema import Failure
    from pipeline.worker import write_failure

    run = prepare(tmp_path, samples=64)
    (unit,) = run.plan().units
    part = dataclasses.replace(unit, block=Block(range(32)))
    write_failure(run.store, part, Failure(class_="crash", type="Died", message="x"))
    (item,) = run.plan().specs
    assert item.todo == (Block(range(32, 64)),)
    assert item.failed == (Block(range(32)),)


def test_stale_results_are_named_with_the_field_that_differs(tmp_path: Path):
    done(prepare(tmp_path, networks=2, samples=16, measurements=UNREACHABLE.format(draws=2)))
    other = prepare(tmp_path, samples=16, measurements=UNREACHABLE.format(draws=2) + "rho = 0.2\n")
    plan = other.plan()
    assert sorted(stale_lines(plan, other.store)) == [
        f"stale: {name} adaptive_sharpness (measurement.rho 0.1 -> 0.2); kept and not used"
        for name in ("mlp0", "mlp1")
    ]
    answer = call("plan", tmp_path / "m.toml", "--run", tmp_path / "run")
    assert answer.err.count("measurement.rho 0.1 -> 0.2") == 2

    shutil.rmtree(tmp_path / "checkpoints/mlp1")
    gone = prepare(tmp_path, samples=16, measurements=UNREACHABLE.format(draws=2))
    (line,) = stale_lines(gone.plan(), gone.store)
    assert line == "stale: mlp1 adaptive_sharpness (no longer in the manifest); kept and not used"

    save_mlp(tmp_path / "checkpoints/mlp0", seed=5)
    retrained = start_run(tmp_path / "m.toml", str(tmp_path / "run"))
    lines = stale_lines(retrained.plan(), retrained.store)
    assert any("checkpoint sha256:" in line and "->" in line for line in lines)


def test_a_launch_keeps_what_each_key_stands_for(tmp_path: Path):
    run = done(prepare(tmp_path, networks=2, samples=16))
    specs = [item.spec for item in run.plan().specs]
    (name,) = run.store.list(f"{SPEC_FOLDER}/")
    kept = json.loads(run.store.get(name))
    assert {key: value["fields"] for key, value in kept.items()} == {s.key: s.fields for s in specs}
    write_specs(specs, run.store)
    assert run.store.list(f"{SPEC_FOLDER}/") == [name], "what is known is not written again"
    done(prepare(tmp_path, networks=3, samples=16))
    (other,) = set(run.store.list(f"{SPEC_FOLDER}/")) - {name}
    assert len(json.loads(run.store.get(other))) == 1, "the new key alone"


def test_what_an_older_flatcensus_kept_of_a_key_is_read(tmp_path: Path):
    """It wrote a file for each."""
    run = done(prepare(tmp_path, samples=16, measurements=UNREACHABLE.format(draws=2)))
    (name,) = run.store.list(f"{SPEC_FOLDER}/")
    ((key, record),) = json.loads(run.store.get(name)).items()
    run.store.delete(name)
    run.store.put_new(f"{SPEC_FOLDER}/{key}.json", json.dumps(record, indent=1).encode())
    write_specs([item.spec for item in run.plan().specs], run.store)
    assert run.store.list(f"{SPEC_FOLDER}/") == [f"{SPEC_FOLDER}/{key}.json"]
    other = prepare(tmp_path, samples=16, measurements=UNREACHABLE.format(draws=2) + "rho = 0.2\n")
    (line,) = stale_lines(other.plan(), other.store)
    assert "measurement.rho 0.1 -> 0.2" in line
    run.store.put(f"{SPEC_FOLDER}/{key}.json", b"{}")
    (line,) = stale_lines(other.plan(), other.store)
    assert "unknown settings" in line


def test_a_launch_that_goes_on_reads_no_row_for_what_was_decided_but_asks_again_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Block] = []

    def counted(store, key, block, damaged):
        asked.append(block)
        return stage_columns(store, key, block, damaged)

    monkeypatch.setattr("pipeline.plan.stage_columns", counted)
    measured = UNREACHABLE.format(draws=8)
    run = done(prepare(tmp_path, samples=16, measurements=measured))
    first = list(asked)
    assert first == [Block(range(16), range(2)), Block(range(16), range(4))]
    (spec,) = run.plan().specs
    last = list_shards(run.store)[spec.spec.key][-1]
    run.store.delete(last.key)
    asked.clear()
    plan = make_plan(run.manifest, run.store, decisions=recall_decisions(run.store))
    assert [unit.block for unit in plan.units] == [last.block]
    assert not asked
    done(run)
    assert asked == first, "no table may rest on what was only remembered"
    run.store.put(DECISIONS, run.store.get(DECISIONS)[:-9])
    assert recall_decisions(run.store) == {}


def test_plans_of_a_run_use_its_own_times_and_cut_as_before(tmp_path: Path):
    run = prepare(tmp_path, samples=160, resources="unit_seconds = 1e-6")
    before = run.plan()
    assert before.calibration.num_units == 0
    done(run)
    plan = run.plan()
    assert (plan.calibration.num_units, plan.calibration.num_networks) == (5, 1)
    assert plan.calibration.rates != before.calibration.rates
    answer = call("plan", prepare_more(tmp_path), "--run", tmp_path / "run")
    assert "1 unit to do, about " in answer.err
    assert "calibrated on 5 finished units of 1 network" in answer.err
    # What was learnt moves no boundary: they are those of a run that knows nothing.
    for shards in list_shards(run.store).values():
        for name in shards[1:]:
            run.store.path(name.key).unlink()
    blocks = [unit.block for unit in run.plan().units]
    assert blocks == [unit.block for unit in before.units][1:]


def prepare_more(folder: Path) -> Path:
    return write_manifest(folder / "m.toml", samples=170)


def test_a_bounded_number_of_records_is_read_and_damaged_ones_are_passed_over(tmp_path: Path):
    run = done(prepare(tmp_path, samples=32))
    ((key, (name,)),) = list_shards(run.store).items()
    specs = {item.spec.key: item.spec for item in run.plan().specs}

    def found(number: int, *, is_gpu: bool = False) -> int:
        present = {key: [name] * number}
        return len(list(finished_units(run.store, specs, present, is_gpu=is_gpu)))

    assert found(1) == 1
    assert found(1, is_gpu=True) == 0, "a CPU says nothing about GPUs"
    assert 1 < found(1000) <= MAX_RECORDS
    run.store.path(name.key).write_bytes(b"no shard")
    assert found(1) == 0


def test_planning_is_a_pure_function_of_manifest_and_store(tmp_path: Path):
    run = done(prepare(tmp_path, networks=2, samples=40))
    again = prepare(tmp_path, networks=2, samples=70)
    first, second = again.plan(), again.plan()
    assert first.units == second.units
    assert first.specs == second.specs
    resolved = resolve(again.manifest, again.store)
    assert make_plan(again.manifest, again.store, resolved=resolved).units == first.units
    assert run.store.uri == again.store.uri
