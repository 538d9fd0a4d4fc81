"""Launches on a real cluster of two nodes whose Python does not have this code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Answer, call
from machines import Cluster, Node, bare_python, namespaces, raylets, requires_namespaces
from populations import save_mlp, write_manifest
from processes import flatcensus, kill, wait_for

from pipeline import launches, ray_jobs
from pipeline.launches import read_launches
from pipeline.shards import list_shards, read_shards
from pipeline.store import open_store
from pipeline.versions import code_version

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(200)]

MEASUREMENTS = """
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 48
"""


# Minutes of units that nobody waits for.
LONG = """
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 4000
target_relative_stderr = 1e-9
"""


def prepare(folder: Path, *, measurements: str = MEASUREMENTS) -> Path:
    for seed in range(3):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    return write_manifest(
        folder / "audit.toml", samples=32, measurements=measurements,
        resources="unit_seconds = 0.01",
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    answer = call("launch", prepare(folder), "--run", folder / "run", "--on", "inline")
    assert answer.code == 0, answer.err
    return folder / "run"


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> str:
    python = bare_python(tmp_path_factory.mktemp("bare") / "venv")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = "from importlib.util import find_spec as f; print(bool(f('ray')), bool(f('pipeline')))"
    told = subprocess.run([python, "-c", found], cwd="/", env=clean, capture_output=True, text=True)
    assert told.stdout.split() == ["True", "False"], told
    return python


@pytest.fixture(scope="module")
def cluster(bare: str) -> Iterator[Cluster]:
    # Without tokens: Ray reads once per process whether there are any. Below, a laptop has one.
    with raylets(Node(python=bare), Node(python=bare), token=False) as cluster:
        yield cluster


@pytest.fixture
def inside(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Commands in this process are let into the cluster."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return cluster


def tables(run: Path) -> dict[str, bytes]:
    return {n: (run / f"tables/{n}.parquet").read_bytes() for n in ("measurements", "summary")}


def shards(run: Path) -> int:
    return sum(len(names) for names in list_shards(open_store(run)).values())


def test_a_detached_launch_outlives_the_command_that_submitted_it(
    undisturbed: Path, inside: Cluster, tmp_path: Path
):
    manifest, run = prepare(tmp_path), tmp_path / "run"
    laptop = flatcensus("launch", manifest, "--run", run, "--on", inside.dashboard, "--detach")
    assert laptop.stderr is not None
    said = [laptop.stderr.readline()]
    while "submitted to" not in said[-1]:
        assert said[-1], said
        said.append(laptop.stderr.readline())
    kill(laptop.pid)
    laptop.communicate()

    again = call("launch", manifest, "--run", run, "--on", inside.address, "--detach")
    assert again.code == 2, again.err
    assert f"flatcensus logs {run} --follow" in again.err

    followed = call("logs", run, "--follow")
    assert "units committed, 0 failed" in followed.out
    assert call("status", run).code == 0
    assert tables(run) == tables(undisturbed)
    (record,) = read_launches(open_store(run))
    assert (record.state, record.job) == ("done", {"dashboard": inside.dashboard})
    assert record.committed == shards(run)
    made_by = {shard.table["code_version"][0].as_py() for shard in read_shards(open_store(run))}
    assert made_by == {code_version()}
    copy = run / f"launches/{record.id}.log"
    wait_for(lambda: "next: flatcensus query" in copy.read_text(), what="the end of the log")
    assert copy.read_text() == call("logs", run).out


def test_stop_lets_units_finish_and_resume_goes_on_where_it_was(inside: Cluster, tmp_path: Path):
    manifest, run = prepare(tmp_path, measurements=LONG), tmp_path / "run"
    begun = call("launch", manifest, "--run", run, "--on", inside.dashboard, "--detach")
    assert begun.code == 0, begun.err
    assert "running on 2 slots" in begun.err
    assert f"flatcensus status {run}" in begun.err
    committed = 0
    for how in ([], ["--now"]):
        stopped = call("stop", run, "--json", *how)
        assert stopped.code == 0, stopped.err
        (said,) = stopped.records
        assert (said["state"], said["committed"] > 0) == ("interrupted", True)
        # What was running when it had to stop at once may have been committed all the same.
        assert 0 <= shards(run) - committed - said["committed"] <= (2 if how else 0)
        committed = shards(run)
        status = call("status", run)
        assert "was stopped" in status.err
        resume = f"flatcensus resume {run} --on {inside.dashboard} --detach"
        assert status.next_step == stopped.next_step == resume
        idle = call("stop", run)
        assert (idle.code, "nothing runs" in idle.err) == (0, True)
        if not how:
            assert call(*resume.split()[1:]).code == 0


def test_nodes_get_this_code_and_those_with_other_versions_no_units(
    undisturbed: Path, inside: Cluster, tmp_path: Path
):
    skewed = bare_python(tmp_path / "skewed")
    (site,) = (tmp_path / "skewed/lib").glob("python*/site-packages")
    (site / "timm-0.0.1.dist-info").mkdir()
    (site / "timm-0.0.1.dist-info/METADATA").write_text("Name: timm\nVersion: 0.0.1\n")
    odd = inside.add(Node(python=skewed))
    try:
        run = tmp_path / "run"
        attached = flatcensus("launch", prepare(tmp_path), "--run", run, "--on", inside.address)
        doctor = call("doctor", "--on", inside.address, "--run", undisturbed, "--json")
        _, said = attached.communicate(timeout=150)
        assert attached.returncode == 0, said
        assert "'timm': ('0.0.1'," in said
        assert "on 2 slots" in said
        assert tables(run) == tables(undisturbed)

        assert doctor.code == 4
        found = [(r["check"], r["state"], r["detail"]) for r in doctor.records]
        nodes = [f for f in found if f[0].startswith("node ")]
        assert len(nodes) == 3
        assert all(state == "ok" and "run folder" in detail for _, state, detail in nodes), nodes
        (wrong,) = [f for f in found if f[:2] == ("versions", "fail")]
        assert "timm 0.0.1 instead of" in wrong[2]
        assert {f[1] for f in found if f[0] in ("jobs", "token", "clock", "health checks")} == {
            "ok"
        }
    finally:
        odd.kill()


def test_a_run_outlives_its_cluster(
    undisturbed: Path, inside: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    laptop = flatcensus(
        "launch", prepare(tmp_path), "--run", run, "--on", inside.dashboard, "--detach"
    )
    wait_for(lambda: run.exists() and shards(run), what="the first result")
    kill(laptop.pid)
    laptop.communicate()
    for machine in inside.machines[:2]:
        machine.kill()
    done = shards(run)
    assert done < shards(undisturbed)

    monkeypatch.setattr(launches, "SILENT_SECONDS", 2.0)
    wait_for(lambda: not read_launches(open_store(run))[0].is_alive, what="silence")
    status = call("status", run)
    assert "has given no sign of life for" in status.err
    assert status.next_step == f"flatcensus resume {run} --on {inside.dashboard} --detach"
    logs = call("logs", run)
    assert logs.code == 0
    assert "Running entrypoint for job" in logs.out
    assert "the log as it was copied last" in logs.err
    assert "nothing runs" in call("stop", run).err
    assert call(*status.next_step.split()[1:]).code == 4  # nobody there
    monkeypatch.undo()

    for name, value in inside.environment.items():
        monkeypatch.setenv(name, value)
    inside.head.start()
    inside.wait_for_nodes(1)
    assert call(*status.next_step.split()[1:]).code == 0
    assert "0 failed" in call("logs", run, "--follow").out
    assert shards(run) == shards(undisturbed)
    assert call("report", run).code == 0
    assert tables(run) == tables(undisturbed)


@requires_namespaces
def test_a_run_folder_that_a_node_does_not_see_is_refused_before_work(bare: str, tmp_path: Path):
    manifest, run = prepare(tmp_path), tmp_path / "run"
    blind = Node(python=bare, hidden=(tmp_path,))
    with namespaces(Node(python=bare), blind, Node(ray=False)) as cluster:
        laptop = cluster.machines[2].popen(
            sys.executable, "-c", "from pipeline.cli import main; main()", "launch", manifest,
            "--run", run, "--on", cluster.dashboard, "--detach", stderr=subprocess.PIPE,
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        _, said = laptop.communicate(timeout=100)
        assert laptop.returncode == 4, said
        assert f"node {cluster.machines[1].mark}: it does not see the run folder {run}" in said
        assert not shards(run)
        (record,) = read_launches(open_store(run))
        assert record.state == "failed"
        assert "does not see" in call("status", run).err


def test_addresses_where_no_cluster_is_are_told_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_jobs, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(ray_jobs, "KNOCK_SECONDS", 1.0)
    manifest = prepare(tmp_path)

    def launched(on: str) -> Answer:
        return call("launch", manifest, "--run", tmp_path / "run", "--on", on, "--detach")

    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and says nothing
        port = mute.getsockname()[1]
        for on in (
            f"http://127.0.0.1:{port}",
            f"127.0.0.1:{port}",
            "http://127.0.0.1:1",
            "[::1]:1",
        ):
            began = time.monotonic()
            answer = launched(on)
            assert (answer.code, "8265" in answer.err) == (4, True), (on, answer.err)
            assert time.monotonic() - began < 20, on
    doctor = call("doctor", "--on", "http://127.0.0.1:1", "--json")
    assert doctor.code == 4
    assert [r["check"] for r in doctor.records if r["state"] == "fail"] == ["jobs"]
    for on in ("local", "inline", "ray://127.0.0.1:10001", "ftp://head:21"):
        assert (launched(on).code, "http://head:8265" in launched(on).err) == (2, True), on
    assert call("launch", manifest, "--on", "http://127.0.0.1:8265").code == 2  # attached
    assert not (tmp_path / "run").exists()
