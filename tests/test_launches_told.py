"""What status, logs and stop say of launches, from records alone: no cluster."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import call
from populations import save_mlp, write_manifest
from processes import flatcensus, wait_for

from pipeline import cluster_commands
from pipeline.cluster_commands import launch_lines, resume_command
from pipeline.job import main as job_main
from pipeline.launches import LaunchRecord, read_launches, stop_requested, write_launch
from pipeline.store import open_store

JOB = {"dashboard": "http://127.0.0.1:1"}  # nobody there


def told(*, seconds: float = 1.0, number: int = 0, **fields) -> LaunchRecord:
    """A launch that gave its last sign of life some seconds ago."""
    then = datetime.now(UTC) - timedelta(seconds=seconds)
    begun = datetime(2026, 1, 1, 12, number, tzinfo=UTC).isoformat()
    known = {"id": f"20260101T12{number:02}00-abcdef", "on": "10.0.0.2:6379", "host": "head",
             "pid": 7, "started_at": begun, "heartbeat_at": then.isoformat()}  # fmt: skip
    return LaunchRecord(**{**known, **fields})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    save_mlp(folder / "checkpoints/mlp0")
    return write_manifest(folder / "audit.toml", samples=4)


@pytest.fixture
def run(manifest: Path, tmp_path: Path) -> Path:
    """A run folder with one launch, inline and done."""
    assert call("launch", manifest, "--run", tmp_path / "run", "--on", "inline").code == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_slots": 2, "committed": 5, "remaining": 9}, "runs with 2 slots: 5 units committed, "
         "9 to do, last sign of life 1.0 s ago"),
        ({"seconds": 300}, "has given no sign of life for 5 min: it was killed, or its machine"),
        ({"state": "submitted", "job": JOB}, "was submitted 1.0 s ago and has not begun"),
        ({"state": "submitted", "seconds": 7000}, "has not begun: it will not start any more"),
        ({"state": "failed", "message": "no GPU", "failed": 2}, "has failed (no GPU): 0 units"),
        ({"state": "interrupted", "committed": 3}, "was stopped: 3 units committed, 0 failed"),
    ],
    ids=lambda value: value.get("state", "running") if isinstance(value, dict) else "",
)  # fmt: skip
def test_each_state_of_a_launch_has_its_sentence(fields, words: str):
    record = told(**fields)
    (line,) = launch_lines([record])
    assert words in line
    assert line.startswith(
        f"launch {record.id} on {(record.job or {}).get('dashboard', record.on)}"
    )


def test_living_launches_are_told_of_and_of_the_others_only_the_newest():
    old, living = told(state="failed"), told(number=1)
    silent, newest = told(number=2, seconds=500), told(number=3, state="done")
    lines = launch_lines([old, living, silent, newest])
    assert [line.split()[1] for line in lines] == [living.id, newest.id]
    assert launch_lines([]) == []


def test_resume_is_advised_where_the_last_launch_was():
    assert resume_command("r", None) == "flatcensus resume r"
    assert resume_command("r", told(on="inline")) == "flatcensus resume r"
    assert resume_command("a b", told()) == "flatcensus resume 'a b' --on 10.0.0.2:6379"
    detached = told(job=JOB)
    assert resume_command("r", detached) == f"flatcensus resume r --on {JOB['dashboard']} --detach"


def test_logs_of_attached_launches_are_on_their_terminals(run: Path, tmp_path: Path):
    answer = call("logs", run)
    assert answer.code == 2
    assert "wrote to its terminal" in answer.err
    assert "has no launch 'x'. Launches: 20" in call("logs", run, "--launch", "x").err
    store = open_store(run)
    record = told(job=JOB, seconds=500)
    write_launch(store, record)
    store.put(f"launches/{record.id}.log", b"first\nlast \xff\n")
    answer = call("logs", run, "--launch", record.id, "--follow")
    assert (answer.code, answer.out) == (0, "first\nlast �\n")
    assert "does not answer" in answer.err


def test_stop_reaches_a_launch_of_another_process(manifest: Path, tmp_path: Path):
    long = tmp_path / "long.toml"
    long.write_text(
        manifest.read_text().replace("checkpoints/*", f"{manifest.parent}/checkpoints/*")
        + '[[measurements]]\nmetric = "adaptive_sharpness"\nmax_draws = 100000\n'
        "target_relative_stderr = 1e-9\n"
    )
    text = long.read_text().replace("[resources]\n", "[resources]\nunit_seconds = 0.01\n")
    long.write_text(text)
    run = tmp_path / "run"
    process = flatcensus("launch", long, "--run", run, "--on", "inline")
    wait_for(lambda: list((run / "shards").rglob("*x*.parquet")), what="a unit")
    stopped = call("stop", run, "--json")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (record,) = read_launches(open_store(run))
    assert stopped.records == [
        {"launch": record.id, "state": "interrupted", "committed": record.committed}
    ]
    assert "flatcensus resume" in stopped.next_step


def test_stop_says_when_nobody_answers(run: Path, monkeypatch: pytest.MonkeyPatch):
    store, record = open_store(run), told(number=9, job=JOB)
    write_launch(store, record)
    monkeypatch.setattr("pipeline.launches.SILENT_SECONDS", 3.0)
    monkeypatch.setattr(cluster_commands, "FOLLOW_SECONDS", 0.1)
    monkeypatch.setattr(cluster_commands, "GRACE_SECONDS", 0.5)
    answer = call("stop", run, "--now")
    assert answer.code == 4
    assert "has given no sign of life for" in answer.err
    assert stop_requested(store, record.id) == "now"


def test_a_job_that_finds_another_disk_says_so(run: Path, capfd: pytest.CaptureFixture[str]):
    assert job_main([str(run), "--launch", "20260101T000000-000000"]) == 4
    assert "does not see the run folder" in capfd.readouterr().err
