"""Slots: one child per checkpoint, and what is made of children that die or fall silent."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from populations import save_mlp, write_manifest
from processes import is_alive, kill, wait_for

from pipeline.outcome import Outcome
from pipeline.run import start_run
from pipeline.slot import Slot
from pipeline.specs import Task

pytestmark = pytest.mark.slow


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    """Two units of each of two networks, in order of the networks."""
    for seed in range(2):
        save_mlp(tmp_path / f"checkpoints/mlp{seed}", seed=seed)
    manifest = write_manifest(tmp_path / "m.toml", samples=64, resources="unit_seconds = 0.001")
    return list(start_run(manifest, str(tmp_path / "run")).plan().units)


@pytest.fixture
def slot() -> Iterator[Slot]:
    slot = Slot(hang_seconds=60.0)
    yield slot
    slot.close()


def run(slot: Slot, task: Task) -> Outcome:
    return pickle.loads(slot.run(task.spec.subject, pickle.dumps(task)))


def child(slot: Slot) -> int:
    assert slot.child is not None
    assert slot.child.pid is not None
    return slot.child.pid


def test_a_child_serves_one_checkpoint_and_its_successor_the_next(slot: Slot, tasks: list[Task]):
    children = []
    for task in tasks:
        assert run(slot, task).status == "committed"
        children.append(child(slot))
    assert children[0] == children[1] != children[2] == children[3]
    assert not is_alive(children[0])
    assert run(slot, tasks[3]).status == "duplicate"


@pytest.mark.parametrize(
    ("number", "hang_seconds", "kind", "words"),
    [
        (signal.SIGKILL, 60.0, "crash", "signal 9"),
        (signal.SIGSEGV, 60.0, "crash", "signal 11"),
        (signal.SIGSTOP, 4.0, "hang", "No sign of life for 4 s"),
    ],
)
def test_a_child_that_dies_or_stops_gives_a_named_outcome_and_the_slot_goes_on(
    slot: Slot, tasks: list[Task], number: int, hang_seconds: float, kind: str, words: str
):
    run(slot, tasks[0])
    first, slot.hang_seconds = child(slot), hang_seconds
    kill(first, signal.SIGSTOP)  # so that it cannot finish before the signal of this test

    def attack() -> None:
        kill(first, number)
        if number != signal.SIGSTOP:
            kill(first, signal.SIGCONT)  # stopped processes receive no other signal but SIGKILL

    timer = threading.Timer(0.5, attack)
    timer.start()
    outcome = run(slot, tasks[1])
    timer.join()
    assert outcome.status == "failed"
    assert outcome.failure_class == kind
    assert outcome.failure is not None
    assert words in outcome.failure.message
    assert "flatcensus resume RUN" in outcome.failure.hint
    wait_for(lambda: not is_alive(first), what="the end of the first child")
    slot.hang_seconds = 60.0
    assert run(slot, tasks[1]).status == "committed"


def test_a_slot_loads_neither_torch_nor_timm():
    code = "import sys, pipeline.slot; print({'torch', 'timm'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_child_with_an_unknown_error_does_no_further_unit(slot: Slot, tasks: list[Task]):
    run(slot, tasks[0])
    first = child(slot)
    odd = replace(tasks[1], spec=replace(tasks[1].spec, fields={}))
    outcome = pickle.loads(slot.run(tasks[0].spec.subject, pickle.dumps(odd)))
    assert outcome.failure_class == "unexpected"
    assert run(slot, tasks[1]).status == "committed"
    assert child(slot) != first


def test_a_child_that_cannot_be_started_is_a_named_outcome(slot: Slot, tasks, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no more processes")

    monkeypatch.setattr(slot.context, "Process", refuse)
    outcome = run(slot, tasks[0])
    assert outcome.failure_class == "crash"
    assert outcome.failure is not None
    assert "no more processes" in outcome.failure.message
