"""Whole launches: the same bytes whoever does the work and whatever is killed on the way."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from populations import Quiet, save_mlp
from processes import flatcensus, is_alive, kill, wait_for, workers

from pipeline.driver import Launch
from pipeline.run import execute, open_run, start_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DETERMINISTIC = ("measurements", "summary", "correlations")
MANIFEST = """
name = "launch"
[data]
name = "digits"
samples = 64
[[train]]
network = "vit"
patch_size = 4
width = [8, 16]
heads = 2
depth = 1
optimizer = "adamw"
learning_rate = 0.003
steps = 60
[[checkpoints]]
source = "local"
paths = ["checkpoints/*"]
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "normalized_mls"
method = "dense"
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 8
[[correlations]]
x = "normalized_mls"
y = "adaptive_sharpness"
[resources]
batch_size = 16
unit_seconds = 0.02
max_slots = {slots}
"""


def prepare(folder: Path, *, slots: int = 2) -> Path:
    for seed in range(2):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    path = folder / "launch.toml"
    path.write_text(MANIFEST.format(slots=slots))
    return path


def launched(manifest: Path, run: Path, *, on: str) -> Launch:
    result = execute(start_run(manifest, str(run)), Quiet(), on=on)
    open_run(str(run)).reduce()
    return result


def tables(run: Path) -> dict[str, bytes]:
    return {name: (run / f"tables/{name}.parquet").read_bytes() for name in DETERMINISTIC}


def shards(run: Path) -> list[Path]:
    return sorted((run / "shards").rglob("*.parquet"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    result = launched(prepare(folder), folder / "run", on="inline")
    assert result.failed == 0
    assert result.committed == len(shards(folder / "run")) > 30
    return folder / "run"


def copied_training(undisturbed: Path, run: Path) -> None:
    """Start from the trained checkpoints, so that the test is about measuring."""
    shutil.copytree(undisturbed / "checkpoints", run / "checkpoints")
    for shard in shards(undisturbed):
        if shard.name == "0-1.parquet":
            target = run / shard.relative_to(undisturbed)
            target.parent.mkdir(parents=True)
            shutil.copy(shard, target)


@pytest.mark.parametrize("slots", [1, 2])
def test_ray_gives_the_same_bytes_as_inline(
    undisturbed: Path, tmp_path: Path, slots: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # local means here, whatever this says
    result = launched(prepare(tmp_path, slots=slots), tmp_path / "run", on="local")
    assert result.failed == result.lost == 0
    assert tables(tmp_path / "run") == tables(undisturbed)


def test_killed_workers_cost_units_in_flight_and_no_byte(undisturbed: Path, tmp_path: Path):
    manifest, run = prepare(tmp_path), tmp_path / "run"
    copied_training(undisturbed, run)
    process = flatcensus("launch", manifest, "--run", run, "--json")
    killed: set[int] = set()

    def kill_one() -> bool:
        for pid in workers(process.pid):
            if pid not in killed and kill(pid):
                killed.add(pid)
                break
        return len(killed) >= 3 or process.poll() is not None

    wait_for(kill_one, what="three kills")
    _, messages = process.communicate(timeout=240)
    assert len(killed) == 3, messages
    assert process.returncode == 0, messages
    assert "worker process died (signal 9)" in messages
    assert tables(run) == tables(undisturbed)
    assert not list(run.rglob(".tmp-*"))


def test_killed_driver_is_continued_by_the_same_command(undisturbed: Path, tmp_path: Path):
    manifest, run = prepare(tmp_path), tmp_path / "run"
    copied_training(undisturbed, run)
    process = flatcensus("launch", manifest, "--run", run)
    before = len(shards(run))
    wait_for(lambda: len(shards(run)) > before + 3, what="a few shards")
    busy = workers(process.pid)
    kill(process.pid)
    process.communicate()
    wait_for(lambda: not any(map(is_alive, busy)), seconds=60, what="the end of all workers")
    done = {path: path.read_bytes() for path in shards(run)}
    assert len(done) < len(shards(undisturbed))

    again = flatcensus("launch", manifest, "--run", run)
    _, messages = again.communicate(timeout=240)
    assert again.returncode == 0, messages
    assert tables(run) == tables(undisturbed)
    assert {path: path.read_bytes() for path in done} == done, "committed shards were redone"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_running_units_and_resume_continues(
    undisturbed: Path, tmp_path: Path, number: signal.Signals
):
    manifest, run = prepare(tmp_path), tmp_path / "run"
    copied_training(undisturbed, run)
    process = flatcensus("launch", manifest, "--run", run)
    before = len(shards(run))
    wait_for(lambda: len(shards(run)) > before + 2, what="a few shards")
    kill(process.pid, number)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert f"flatcensus resume {run}" in messages
    assert len(shards(run)) < len(shards(undisturbed))
    resumed = flatcensus("resume", run)
    _, messages = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, messages
    assert tables(run) == tables(undisturbed)


def test_truncated_shard_is_quarantined_and_its_unit_runs_again(undisturbed: Path, tmp_path: Path):
    manifest, run = prepare(tmp_path), tmp_path / "run"
    shutil.copytree(undisturbed, run)
    victim = next(p for p in shards(run) if "x" in p.name)
    victim.write_bytes(victim.read_bytes()[:-100])
    process = flatcensus("launch", manifest, "--run", run, "--on", "inline")
    _, messages = process.communicate(timeout=240)
    assert process.returncode == 0, messages
    assert f"{victim.relative_to(run)} was moved to quarantine/" in messages
    assert "1 unit committed" in messages
    (kept,) = (run / "quarantine").rglob("*.0")
    assert kept.name == victim.name + ".0"
    assert tables(run) == tables(undisturbed)
