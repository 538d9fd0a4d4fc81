"""Slots as Ray gives them: shares of GPUs (as numbers; no device is needed), and their memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from populations import save_mlp, write_manifest

from pipeline.entries import ResourceSpec
from pipeline.errors import ResourceError
from pipeline.plan import make_plan
from pipeline.ray_executor import RayExecutor
from pipeline.run import start_run
from pipeline.slot import _memory_bytes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    """Four slots on two GPUs."""
    import ray

    ray.init("local", include_dashboard=False, num_cpus=6, num_gpus=2, log_to_driver=False)
    executor = RayExecutor(ResourceSpec(num_gpus=0.5))
    try:
        end = time.monotonic() + 60
        while len(executor.places) < 4 and time.monotonic() < end:
            executor.wait(0.5)
        yield executor
    finally:
        executor.close()
        ray.shutdown()


def test_halves_of_gpus_are_slots_that_share_its_memory(executor: RayExecutor):
    pools = Counter(place.pool for place in executor.places.values())
    assert sorted(pools.values()) == [2, 2]
    assert len({place.node for place in executor.places.values()}) == 1
    assert all(" gpu " in pool for pool in pools)


def test_units_run_on_all_slots_at_once_and_each_answers_once(
    executor: RayExecutor, tmp_path: Path
):
    save_mlp(tmp_path / "checkpoints/mlp", seed=0)
    manifest = write_manifest(
        tmp_path / "m.toml", samples=64, resources="unit_seconds = 0.001\nbatch_size = 16",
        measurements='[[measurements]]\nmetric = "adaptive_sharpness"\nmax_draws = 2',
    )  # fmt: skip
    run = start_run(manifest, str(tmp_path / "run"))
    tasks = list(make_plan(run.manifest, run.store).units)[:4]
    for slot, task in zip(executor.places, tasks, strict=True):
        executor.start(slot, task)
    finished = []
    end = time.monotonic() + 120
    while len(finished) < 4 and time.monotonic() < end:
        finished += executor.wait(0.5)
    assert {item.slot for item in finished} == set(executor.places)
    assert [item.outcome.status for item in finished if item.outcome] == ["committed"] * 4
    assert len(list((tmp_path / "run/shards").rglob("*.parquet"))) == 4


def test_a_cluster_without_slots_is_waited_for_but_not_for_ever(
    executor: RayExecutor, caplog: pytest.LogCaptureFixture
):
    places = {number: slot.place for number, slot in executor.slots.items()}
    try:
        for slot in executor.slots.values():
            slot.place = None
        executor.had_slots_at -= 100.0
        executor.wait(0.0)
        assert "the cluster has had no slot for 10" in caplog.text
        executor.had_slots_at -= 600.0
        with pytest.raises(ResourceError, match=r"no slot for 70\d s.*then run the same command"):
            executor.wait(0.0)
    finally:
        for number, place in places.items():
            executor.slots[number].place = place
    executor.wait(0.0)


def test_the_memory_of_a_machine_is_known():
    size = _memory_bytes()
    assert size is not None
    assert 2**28 < size < 2**50
