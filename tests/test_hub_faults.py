"""What goes wrong between hub and disk, with the true client: stalls, kills, crowds, full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import STALL_SECONDS, FakeHub, Fault
from hub_world import NAMES, WEIGHTS, environment, point, served, weights
from huggingface_hub import constants
from processes import wait_for

from pipeline import hub_cache, patience
from pipeline.download import download
from pipeline.entries import DataSpec
from pipeline.errors import HubError, StoreError
from pipeline.hub import resolve
from pipeline.hub_data import files

NAME = NAMES[0]
DOWNLOAD = (
    "from pipeline.download import download; from pipeline.hub_file import *;"
    f"print(download(HubFile('timm/{NAME}', '{{commit}}', '{WEIGHTS}', {{size}}, '{{sha256}}')))"
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.0)
    with served(NAME) as server:
        point(server, monkeypatch, tmp_path)
        yield server


def start(hub: FakeHub, folder: Path, **options) -> subprocess.Popen[str]:
    """Download the weights in a process of its own."""
    file = resolve(NAME)
    code = DOWNLOAD.format(commit=file.commit, size=file.size, sha256=file.sha256)
    env = environment(hub, folder)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_a_connection_that_stalls_is_given_up_and_resumed(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    assert constants.HF_HUB_DOWNLOAD_TIMEOUT < STALL_SECONDS
    hub.faults = [Fault("/cdn/", stall_after=1000)]
    assert download(resolve(NAME)).read_bytes() == weights(NAME)
    assert hub.bodies(WEIGHTS) == 2


def test_plain_requests_are_used_because_the_xet_client_has_no_timeout() -> None:
    assert constants.HF_HUB_DISABLE_XET


def test_four_processes_that_want_one_file_fetch_it_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.seconds = 1.0
    crowd = [start(hub, tmp_path) for _ in range(4)]
    paths = [process.communicate(timeout=120)[0].strip() for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 4
    assert len(set(paths)) == 1
    assert Path(paths[0]).read_bytes() == weights(NAME)
    assert hub.bodies(WEIGHTS) == 1


def test_a_killed_download_blocks_nobody_and_leaves_nothing_behind(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.faults = [Fault("/cdn/", stall_after=1000)]
    victim = start(hub, tmp_path)
    blobs = tmp_path / f"home/hub/models--timm--{NAME}/blobs"
    wait_for(lambda: list(blobs.glob("*.incomplete")), what="a partial file")
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert list(blobs.glob("*.incomplete")), "huggingface_hub leaves it, and never takes it up"
    heir = start(hub, tmp_path)
    path = heir.communicate(timeout=120)[0].strip()
    assert Path(path).read_bytes() == weights(NAME)
    assert not list(blobs.glob("*.incomplete"))


def test_a_partial_file_that_somebody_is_writing_is_left_alone(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults = [Fault("/cdn/", stall_after=1000)]
    writer = start(hub, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    blobs = tmp_path / f"home/hub/models--timm--{NAME}/blobs"
    wait_for(lambda: list(blobs.glob("*.incomplete")), what="a partial file")
    hub_cache.remove_leftovers(resolve(NAME))
    assert list(blobs.glob("*.incomplete"))
    writer.kill()
    writer.communicate()
    hub_cache.remove_leftovers(resolve(NAME))
    assert not list(blobs.glob("*.incomplete"))


def test_a_file_that_does_not_fit_is_not_begun(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_cache, "free_bytes", lambda: hub_cache.RESERVE_BYTES + 1000)
    with pytest.raises(StoreError, match=r"needs 1.* MB and 268 MB in reserve.* has 268 MB") as e:
        download(resolve(NAME))
    assert e.value.disk_full
    assert hub.begun == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_stops_the_launch_not_the_unit(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pipeline.download.hf_hub_download", full)
    with pytest.raises(StoreError, match="no space is left for it in the cache") as error:
        download(resolve(NAME))
    assert error.value.disk_full


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_disk_that_is_really_full(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small))
        monkeypatch.setattr(hub_cache, "require_space", lambda file: None)
        with pytest.raises(StoreError, match="no space is left"):
            download(resolve(NAME))
        assert not list(small.rglob("*.incomplete")), "nothing half-written stays"
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("repo", ["one/two/three", "a space/b", "a--b"])
def test_a_name_that_no_repository_can_have_is_an_error_of_the_hub(repo: str) -> None:
    with pytest.raises(HubError, match="owner/name"):
        files(DataSpec(name="hub", repo=repo))


def test_an_answer_that_is_no_record_is_an_error_of_the_hub(hub: FakeHub) -> None:
    hub.faults = [Fault("/api/", status=200)]
    with pytest.raises(HubError, match="something else than the hub's records"):
        resolve(NAME)


def test_a_retry_after_without_a_zone_is_taken_for_utc(hub: FakeHub) -> None:
    date = {"Retry-After": "Wed, 21 Oct 2015 07:28:00"}
    hub.faults = [Fault("/api/", status=503, headers=date)]
    assert resolve(NAME).repo_id == f"timm/{NAME}"
