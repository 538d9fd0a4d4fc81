"""The scheduler's decisions, with an executor whose slots fail on demand but really measure."""

import errno
import math
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from populations import Quiet, save_mlp, write_manifest

from pipeline.driver import launch
from pipeline.errors import HubError, StoreError
from pipeline.executor import Finished, Place
from pipeline.hub_file import HubFile
from pipeline.outcome import HINTS, Outcome
from pipeline.plan import make_plan
from pipeline.prefetch import Ahead
from pipeline.run import Run, start_run
from pipeline.scheduler import MAX_LOST_SLOTS, MAX_SILENCES, Launch, Scheduler
from pipeline.schema import Failure
from pipeline.shards import list_shards, read_shards
from pipeline.specs import Task
from pipeline.worker import Workbench, run_unit, write_failure

BOTH = """
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 2
"""


class Scripted:
    """Slots that ask a script first: it gives an outcome, 'lost', or None to really run."""

    def __init__(self, script: Callable[[Task], object], slots: int = 2) -> None:
        self.script, self.slots, self.bench = script, slots, Workbench()
        self.dead: set[int] = set()
        self.pending: list[tuple[int, Task]] = []
        self.attempts: list[Task] = []
        self.most_at_once = 0

    @property
    def places(self) -> dict[int, Place]:
        return {slot: Place("here", "here") for slot in range(self.slots)}

    def prefetch(self, node: str, file: HubFile) -> None:
        raise AssertionError("nothing here is on the hub")

    def start(self, slot: int, task: Task) -> None:
        assert slot not in [s for s, _ in self.pending], "a busy slot got a second unit"
        self.pending.append((slot, task))
        self.most_at_once = max(self.most_at_once, len(self.pending))

    def wait(self, timeout: float) -> list[Finished]:
        if not self.pending:
            return []
        slot, task = self.pending.pop(0)
        self.attempts.append(task)
        answer = "lost" if slot in self.dead else self.script(task)
        if answer == "lost":
            return [Finished(slot, task, None)]
        return [Finished(slot, task, answer or run_unit(task, self.bench))]

    def close(self) -> None:
        self.pending.clear()


def failed(kind, message: str = "it broke", *, disk_full: bool = False) -> Outcome:
    failure = Failure(class_=kind, type="Broken", message=message, hint=HINTS[kind])
    return Outcome("failed", 0.1, failure, kind, disk_full=disk_full)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return two_networks(tmp_path, unit_seconds=0.001)


def two_networks(folder: Path, *, unit_seconds: float) -> Run:
    for seed in range(2):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    manifest = write_manifest(
        folder / "m.toml", samples=64, measurements=BOTH,
        resources=f"unit_seconds = {unit_seconds}\nbatch_size = 16",
    )  # fmt: skip
    return start_run(manifest, str(folder / "run"))


def go(run: Run, script: Callable[[Task], object], **options):
    executor, observer = Scripted(script), Quiet()
    result = launch(run.manifest, run.store, lambda: executor, observer, **options)
    return result, executor, observer


def test_every_unit_is_done_once_and_slots_keep_their_checkpoint(run: Run):
    result, executor, _ = go(run, lambda task: None)
    units = Counter((t.spec.key, t.block) for t in executor.attempts)
    assert set(units.values()) == {1}
    # Per network: sensitivity in 2 units of 32 images, sharpness in 8 groups for each of 2 draws.
    assert result.committed == len(units) == 2 * (2 + 8 * 2)
    assert result.failed == result.retried == 0
    assert executor.most_at_once == 2
    assert not make_plan(run.manifest, run.store).units
    # Two networks on two slots: each slot serves one of them until its units run out.
    by_slot = [[t.spec.subject for t in executor.attempts[i::2]] for i in range(2)]
    assert all(len(set(subjects)) == 1 for subjects in by_slot)


def test_a_second_launch_does_nothing_and_opens_no_executor(run: Run):
    go(run, lambda task: None)

    def refuse():
        raise AssertionError("no executor is needed")

    result = launch(run.manifest, run.store, refuse, Quiet())
    assert (result.committed, result.failed) == (0, 0)


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.scheduler.REST_SECONDS", (0.0, 0.0))


def test_a_slot_that_is_gone_rests_and_leaves_the_units_to_the_others(run: Run):
    executor, observer = Scripted(lambda task: None), Quiet()
    executor.dead = {0}
    result = launch(run.manifest, run.store, lambda: executor, observer)
    assert result.failed == 0
    assert result.committed == 2 * (2 + 8 * 2)
    assert 1 <= result.lost <= 8  # pauses of 1, 2, 4 ... seconds, not a loss per unit


@pytest.mark.usefixtures("no_rest")
def test_lost_slots_cost_the_unit_no_attempt_until_the_limit(run: Run):
    lost: Counter[object] = Counter()

    def script(task: Task):
        lost[task.block, task.spec.key] += 1
        return "lost" if lost[task.block, task.spec.key] <= MAX_LOST_SLOTS else None

    result, _, observer = go(run, script)
    assert result.failed == 0
    assert result.lost == MAX_LOST_SLOTS * result.committed
    assert all("requeued" in note for note in observer.notes)


@pytest.mark.usefixtures("no_rest")
def test_units_whose_slots_are_always_lost_become_failure_rows(run: Run):
    result, _, _ = go(run, lambda task: "lost")
    assert result.committed == 0
    plan = make_plan(run.manifest, run.store)
    assert not plan.units
    assert {s.state for s in plan.specs} == {"failed"}


def test_memory_failures_halve_the_batch_then_fail_with_the_setting_to_change(run: Run):
    def script(task: Task):
        return failed("memory") if task.batch_size > 4 else None

    result, executor, observer = go(run, script)
    assert result.failed == 0
    assert {t.batch_size for t in executor.attempts} == {16, 8, 4}
    assert any("again with batch size 8" in note for note in observer.notes)


def test_permanent_failures_are_not_retried_and_have_a_row(run: Run):
    result, executor, _ = go(run, lambda task: failed("permanent", "NaN logits"))
    assert result.failed == len(executor.attempts)
    _, tables = run.reduce()
    assert set(tables.failures["failure_message"]) == {"NaN logits"}
    assert set(tables.summary["status"]) == {"failed"}
    assert tables.summary["value"].isna().all()
    assert tables.summary["status_text"].str.contains("NaN logits").all()


def test_failed_units_stay_failed_until_somebody_asks_to_try_again(run: Run):
    first, _, _ = go(run, lambda task: failed("permanent"))
    again, _, _ = go(run, lambda task: None)
    assert (again.committed, again.failed) == (0, 0)
    retried, _, _ = go(run, lambda task: None, retry_failed=True)
    assert retried.committed == first.failed
    _, tables = run.reduce()
    assert set(tables.summary["status"]) <= {"ok", "target_not_reached", "limited_by_samples"}
    assert len(tables.failures) == 0


def test_a_unit_that_fails_again_gets_a_second_failure_record(run: Run):
    go(run, lambda task: failed("permanent", "first"))
    go(run, lambda task: failed("permanent", "second"), retry_failed=True)
    _, tables = run.reduce()
    assert set(tables.failures["failure_message"]) == {"second"}


def test_a_unit_that_kills_its_process_twice_is_cut_in_two_and_the_culprit_is_named(tmp_path):
    run = two_networks(tmp_path, unit_seconds=100.0)

    def script(task: Task):
        poison = task.spec.metric == "normalized_mls" and task.spec.checkpoint == "mlp0"
        return failed("crash", "signal 11") if poison and 40 in task.block.samples else None

    result, executor, observer = go(run, script)
    assert {t.block.samples for t in executor.attempts if t.bisected} == {range(32), range(32, 64)}
    assert sum("in two halves" in note for note in observer.notes) == 1
    assert result.failed == 1
    _, tables = run.reduce()
    (row,) = tables.failures.to_dict("records")
    assert (row["start"], row["stop"]) == (32, 64)


def test_transient_failures_wait_and_are_tried_again(run: Run, monkeypatch):
    monkeypatch.setattr("pipeline.scheduler.BACKOFF_SECONDS", (0.01, 0.01))
    result, executor, observer = go(
        run, lambda task: failed("transient") if task.attempt == 1 else None
    )
    assert result.failed == 0
    assert result.retried == result.committed
    assert {t.attempt for t in executor.attempts} == {1, 2}
    assert "again in 0.01 s" in observer.notes[0]


def test_hangs_are_tried_max_attempts_times(run: Run):
    result, executor, _ = go(run, lambda task: failed("hang"))
    attempts = Counter((t.spec.key, t.block) for t in executor.attempts)
    assert set(attempts.values()) == {run.manifest.resources.max_attempts}
    assert result.committed == 0


@pytest.mark.parametrize("full", [True, False])
def test_a_store_that_cannot_be_written_stops_the_launch_with_exit_code_4(run: Run, full: bool):
    with pytest.raises(StoreError, match="cannot create it") as caught:
        go(run, lambda task: failed("store", "cannot create it", disk_full=full))
    assert caught.value.disk_full == full
    assert caught.value.exit_code == 4


def test_a_full_disk_is_told_apart_whichever_disk_it_is(run: Run, monkeypatch: pytest.MonkeyPatch):
    (unit, *_) = make_plan(run.manifest, run.store).units
    errors = (
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
        StoreError("cannot create x", disk_full=True),
        StoreError("cannot reach the server"),
    )
    for error, full in zip(errors, (True, True, False), strict=True):

        def broken(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("pipeline.worker._with_weights", broken)
        outcome = run_unit(unit, Workbench())
        assert outcome.failure_class == "store"
        assert pickle.loads(pickle.dumps(outcome)).disk_full == full


def test_a_hub_that_does_not_answer_three_units_in_a_row_stops_the_launch(run: Run):
    with pytest.raises(HubError) as caught:
        go(run, lambda task: failed("unreachable", "cannot reach the hub"))
    assert (caught.value.exit_code, caught.value.unasked) == (4, True)
    assert not list_shards(run.store), "no failure rows: the same command continues"


@pytest.mark.parametrize(
    ("unasked", "offline", "expected"),
    [(True, False, "unreachable"), (True, True, "permanent"), (False, False, "permanent")],
)
def test_only_a_hub_that_did_not_answer_is_unreachable(
    unasked: bool, offline: bool, expected: str, run: Run, monkeypatch: pytest.MonkeyPatch
):
    def refuse(task: Task):
        raise HubError("no", unasked=unasked)

    monkeypatch.setattr("pipeline.worker._with_weights", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    (unit, *_) = make_plan(run.manifest, run.store).units
    assert run_unit(unit, Workbench()).failure_class == expected


def test_a_silent_web_server_fails_its_checkpoint_and_not_the_launch(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    def refuse(task: Task):
        raise HubError("no", unasked=True)

    monkeypatch.setattr("pipeline.worker._with_weights", refuse)
    (unit, *_) = make_plan(run.manifest, run.store).units
    assert unit.spec.ref is not None
    ref = unit.spec.ref.model_copy(update={"identity": "url:https://x.org/gcvit-0123abcd.pth"})
    unit = replace(unit, spec=replace(unit.spec, ref=ref))
    assert run_unit(unit, Workbench()).failure_class == "transient"


def test_one_checkpoint_that_the_hub_never_gives_does_not_stop_the_launch(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.scheduler.BACKOFF_SECONDS", (0.01, 0.01))
    bad = make_plan(run.manifest, run.store).units[0].spec.subject
    result, _, _ = go(run, lambda t: failed("unreachable") if t.spec.subject == bad else None)
    assert result.committed == result.failed == 2 + 8 * 2
    assert not make_plan(run.manifest, run.store).units


def test_a_hub_that_is_silent_now_and_then_costs_another_attempt(run: Run):
    silent: list[Task] = []

    def script(task: Task):
        if len(silent) < MAX_SILENCES - 1:
            silent.append(task)
            return failed("unreachable")
        return None

    result, _, _ = go(run, script)
    assert result.retried == len(silent) == MAX_SILENCES - 1
    assert result.failed == 0


def test_unknown_errors_get_a_second_attempt_on_gpus_only(run: Run):
    def script(task: Task):
        return failed("unexpected") if task.attempt == 1 else Outcome("committed", 0.1)

    on_cpu, _, _ = go(run, script)
    assert (on_cpu.committed, on_cpu.retried) == (0, 0)
    resources = run.manifest.resources.model_copy(update={"num_gpus": 1.0})
    manifest = replace(run.manifest, resources=resources)
    units = make_plan(manifest, run.store, retry_failed=True).units
    assert {unit.device for unit in units} == {"cuda"}
    executor, result = Scripted(script), Launch()
    scheduler = Scheduler(run.store, executor, Quiet(), result, [], max_attempts=3)
    assert scheduler.add(units.groups, Ahead({}, per_slot=0)) == len(units)
    scheduler.run(until=math.inf)
    assert (result.committed, result.retried, result.failed) == (len(units), len(units), 0)


def test_a_failure_on_a_gpu_is_recorded_by_a_scheduler_without_one(run: Run):
    task = replace(make_plan(run.manifest, run.store).units[0], device="cuda")
    failure = Failure(class_="permanent", type="Broken", message="it broke")
    assert write_failure(run.store, task, failure)
    (shard,) = read_shards(run.store)
    assert shard.unit.device == "cuda"
    assert shard.unit.peak_bytes is None


def test_memory_that_ends_on_the_cpu_is_a_memory_failure(run: Run, monkeypatch):
    def measure(self, subject, block):
        torch.empty(10**15)

    monkeypatch.setattr("tasks.sensitivity.NormalizedMls.measure", measure)
    (unit, *_) = make_plan(run.manifest, run.store).units
    outcome = run_unit(unit, Workbench())
    assert outcome.failure_class == "memory"


def test_training_on_other_images_than_planned_is_refused(tmp_path: Path):
    manifest = write_manifest(
        tmp_path / "m.toml", measurements="",
        extra='[[train]]\nnetwork = "mlp"\nwidth = 8\ndepth = 1\nsteps = 2\n',
        checkpoints=str(save_mlp(tmp_path / "other")),
    )  # fmt: skip
    (unit,) = start_run(manifest, str(tmp_path / "run")).plan().units
    other = replace(unit.spec, fields=unit.spec.fields | {"test_data": "0" * 64})
    outcome = run_unit(replace(unit, spec=other), Workbench())
    assert outcome.failure_class == "permanent"
    assert outcome.failure is not None
    assert "test images of 'digits' changed" in outcome.failure.message
