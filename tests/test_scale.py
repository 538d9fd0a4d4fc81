"""Plans and launches of many units: what they count, not how long they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from many_units import Tiny, many_units
from populations import Quiet

from pipeline import coverage, units
from pipeline.coverage import missing_blocks
from pipeline.frozen import thaw
from pipeline.plan import make_plan
from pipeline.run import Run, execute, open_run
from pipeline.unit_queue import UnitQueue
from tasks.block import Block
from tasks.registry import METRICS


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "tiny", Tiny)


class Counted:
    """A store that counts its calls."""

    def __init__(self, store: Any) -> None:
        self.store, self.calls = store, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return found(*arguments, **options)

        return call


def counted_calls(run: Run, number: Callable[[Run], object]) -> Counter[str]:
    store = Counted(run.store)
    number(Run(run.manifest, store))  # type: ignore[arg-type]
    return store.calls


def recall(run: Run) -> object:
    return make_plan(run.manifest, run.store, resolved=thaw(run.manifest, run.store))


@pytest.mark.parametrize("what", [Run.plan, recall], ids=["plan", "status"])
def test_a_plan_asks_the_store_as_often_for_many_specs_as_for_few(tmp_path: Path, what):
    calls = []
    for checkpoints, samples in ((2, 2), (12, 9)):
        run = many_units(tmp_path / f"{checkpoints}", checkpoints=checkpoints, samples=samples)
        execute(run, Quiet(), on="inline")
        calls.append(counted_calls(open_run(run.store.uri), what))
        # Up to 60 units tell how long they took, however many there are.
        calls[-1].pop("get")
    assert calls[0] == calls[1]


def test_a_launch_writes_one_object_per_unit_and_a_few_of_its_own(tmp_path: Path):
    written = {}
    for checkpoints in (2, 20):
        run = many_units(tmp_path / f"{checkpoints}", checkpoints=checkpoints, samples=2)
        execute(run, Quiet(), on="inline")
        keys = run.store.list()
        written[checkpoints] = [key for key in keys if not key.startswith("shards/")]
        assert len(keys) - len(written[checkpoints]) == 2 * checkpoints
    assert len(written[2]) == len(written[20])


def test_a_plan_of_a_million_units_makes_none_and_a_queue_of_them_makes_what_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = Counter[str]()

    def task(**fields: Any) -> Any:
        made["tasks"] += 1
        return real(**fields)

    real = units.Task
    monkeypatch.setattr(units, "Task", task)
    run = many_units(tmp_path, checkpoints=4, samples=500, draws=500)
    plan = run.plan()
    assert len(plan.units) == 10**6
    assert plan.predicted_seconds > 0
    queue = UnitQueue()
    for group in plan.units.groups:
        queue.add_group(group)
    assert len(queue) == 10**6
    assert made["tasks"] == 0
    for _ in range(10):
        assert queue.take("") is not None
    assert made["tasks"] <= 10 + len(plan.units.groups)


def test_work_on_coverage_grows_as_the_shards_whatever_their_draws(
    monkeypatch: pytest.MonkeyPatch,
):
    """Bands of draws are looked at with the ranges that reach into them, not with all."""
    looked = Counter[int]()

    def joined(ranges: Iterable[range]) -> list[range]:
        ranges = list(ranges)
        looked[size] += len(ranges)
        return real(ranges)

    real = coverage._joined
    monkeypatch.setattr(coverage, "_joined", joined)
    for size in (10, 40):
        have = [Block(range(s, s + 1), range(d, d + 1)) for d in range(size) for s in range(10)]
        del have[7]
        assert missing_blocks(Block(range(10), range(size)), have) == [Block(range(7, 8))]
    assert looked[40] <= 4 * looked[10]
