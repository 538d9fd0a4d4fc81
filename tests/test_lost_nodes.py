"""Nodes that die, join, fall silent or are cut off: their units run elsewhere, nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from machines import Cluster, Node, namespaces, raylets, requires_namespaces
from processes import kill, wait_for

from pipeline.launches import LaunchRecord, read_launches, request_stop
from pipeline.run import open_run
from pipeline.store import open_store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

# Units of some hundredths of a second, more than any of these tests will see done.
MANIFEST = """
name = "lost"
[data]
name = "digits"
samples = 496
[[train]]
network = "vit"
patch_size = 2
width = [16, 24]
heads = 2
depth = 2
optimizer = "adamw"
learning_rate = 0.003
steps = 20
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 400
min_draws = 400
[resources]
batch_size = 16
unit_seconds = 0.3
"""


# The command with less patience: for tests that are not about how long it waits.
HASTY = "from pipeline import ray_executor as r; r.HEAD_SECONDS = r.SILENT_SECONDS = 10.0; "


class Going:
    """A launch on a cluster, by a command on its head."""

    def __init__(self, cluster: Cluster, folder: Path, before: str = HASTY) -> None:
        manifest = folder / "lost.toml"
        manifest.write_text(MANIFEST)
        self.run = folder / "run"
        self.store = open_store(self.run)
        self.folder = folder
        with (folder / "messages").open("w") as messages:
            self.process = cluster.head.popen(
                sys.executable, "-c", f"{before}from pipeline.cli import main; main()", "launch",
                manifest, "--run", self.run, "--on", cluster.address, stdout=subprocess.DEVNULL,
                stderr=messages, env={"PYTHONPATH": str(Path.cwd())},
            )  # fmt: skip

    @property
    def record(self) -> LaunchRecord:
        (record,) = read_launches(self.store)
        return record

    @property
    def messages(self) -> str:
        return (self.folder / "messages").read_text()

    def shards(self) -> int:
        return len(list((self.run / "shards").rglob("*.parquet")))

    def wait(self, condition, *, seconds: float = 90, what: str) -> float:
        """Seconds until a condition holds."""
        began = time.monotonic()

        def held() -> bool:
            assert self.process.poll() is None, self.messages
            time.sleep(0.2)
            return bool(condition())

        wait_for(held, seconds=seconds, what=what)
        return time.monotonic() - began

    def wait_for_units(self, number: int) -> None:
        target = self.shards() + number
        self.wait(lambda: self.shards() >= target, what=f"{number} more units")


@contextmanager
def going(cluster: Cluster, folder: Path, before: str = HASTY) -> Iterator[Going]:
    it = Going(cluster, folder, before)
    try:
        wait_for(
            lambda: it.process.poll() is not None or (it.run / "launches").is_dir(), what="a launch"
        )
        it.wait(lambda: it.record.num_slots == len(cluster.machines), what="all slots")
        it.wait_for_units(10)
        yield it
        request_stop(it.store, it.record.id, "drain")
        assert it.process.wait(timeout=60) == 130, it.messages
        assert it.record.state == "interrupted"
        assert it.record.failed == it.record.retried == 0, it.messages
        # A writer that was killed may leave its unfinished file; the next launch removes it.
        assert len(list(it.run.rglob(".tmp-*"))) <= 1
        it.store.clean_temporaries(0.0)
        assert not list(it.run.rglob(".tmp-*"))
        assert not list((it.run / "quarantine").rglob("*"))
        plan = open_run(str(it.run)).recall()
        assert plan.num_failed == 0
    finally:
        kill(it.process.pid)


def test_a_killed_node_a_silent_slot_and_a_node_that_joins(tmp_path: Path):
    with raylets(Node(cpus=1), Node(cpus=1)) as cluster, going(cluster, tmp_path) as it:
        node = cluster.machines[1]
        # Its machine is frozen: nothing fails, nothing answers.
        (slot,) = node.processes("SlotActor")
        kill(slot, signal.SIGSTOP)
        seconds = it.wait(lambda: it.record.lost == 1, what="the silent slot's loss")
        assert seconds < 45
        it.wait_for_units(5)
        kill(slot, signal.SIGCONT)
        it.wait(lambda: it.record.num_slots == 2, what="the slot's return")
        # It dies.
        node.kill()
        it.wait(lambda: it.record.num_slots == 1, what="the node's loss")
        it.wait_for_units(5)
        # Another comes.
        cluster.add(Node(cpus=1), wait=False)
        it.wait(lambda: it.record.num_slots == 2, what="the new node's slot")
        it.wait_for_units(5)
        assert it.record.lost <= 2, "at most the unit in flight, each time"


@requires_namespaces
def test_a_pulled_cable_costs_the_unit_in_flight_and_less_than_45_seconds(tmp_path: Path):
    with namespaces(Node(cpus=1), Node(cpus=1)) as cluster, going(cluster, tmp_path, "") as it:
        node = cluster.machines[1]
        node.unplug()
        seconds = it.wait(lambda: it.record.lost == 1, what="the loss")
        print(f"recovered {seconds:.1f} s after the cable was pulled")
        assert seconds < 45
        it.wait_for_units(5)
        node.plug()
        assert it.record.lost == 1


def test_a_launch_whose_cluster_dies_ends_with_exit_code_4_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with raylets(Node(cpus=1)) as cluster:
        it = Going(cluster, tmp_path)
        wait_for(lambda: it.shards() >= 10, what="ten units")
        for pid in cluster.head.processes("gcs_server"):
            kill(pid)
        assert it.process.wait(timeout=90) == 4, it.messages
    assert "the head of the Ray cluster does not answer" in it.messages
    assert "start the cluster again, then run the same command" in it.messages
    assert it.record.state == "failed"
    assert open_run(str(it.run)).recall().num_failed == 0


def test_a_launch_that_ends_while_its_cluster_is_dead_does_not_wait_for_it(tmp_path: Path):
    with raylets(Node(cpus=1)) as cluster:
        it = Going(cluster, tmp_path)
        wait_for(lambda: it.shards() >= 10, what="ten units")
        for pid in cluster.head.processes("gcs_server"):
            kill(pid)
        request_stop(it.store, it.record.id, "drain")
        began = time.monotonic()
        assert it.process.wait(timeout=90) == 130, it.messages
        assert time.monotonic() - began < 40
    assert it.record.state == "interrupted"
