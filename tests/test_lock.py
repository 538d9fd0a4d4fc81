"""Locks: what a name stands for is written down once, and nobody is asked again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import call
from fake_hub import COMMIT, FakeHub, Fault
from hub_world import NAMES, WEIGHTS, point, served, weights, write_census
from huggingface_hub import constants

from pipeline import patience
from pipeline.errors import HubError, StoreError
from pipeline.hub_file import HubFile, identified, url_file
from pipeline.lock import Lock, keep, read_lock, run_lock, write_lock
from pipeline.run import start_run
from pipeline.specs import Resolved
from pipeline.store import open_store

MOVED = "f" * 40
FIRST, SECOND = NAMES[:2]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.0)
    with served(FIRST, SECOND) as server:
        point(server, monkeypatch, tmp_path)
        yield server


@pytest.fixture
def census(tmp_path: Path) -> Path:
    return write_census(tmp_path / "census.toml", FIRST, SECOND)


def found(census: Path) -> Resolved:
    from pipeline.resolve import resolve

    run = start_run(census, str(census.parent / "run"))
    return resolve(run.manifest, run.store)


def commits(resolved: Resolved) -> set[str]:
    return {file.commit for files in resolved.files.values() for file in files}


def test_a_lock_holds_the_whole_record_and_is_read_back(hub: FakeHub, census: Path) -> None:
    assert call("lock", census).code == 0
    lock = read_lock(census.with_suffix(".lock.json"))
    assert list(lock.files) == [f"timm:{FIRST}", f"timm:{SECOND}"]
    (file,) = lock.files[f"timm:{FIRST}"]
    assert (file.repo_id, file.commit, file.filename) == (f"timm/{FIRST}", COMMIT, WEIGHTS)
    assert file.size == len(weights(FIRST))
    assert file.sha256 is not None


def test_with_a_lock_nobody_is_asked_and_a_moved_branch_is_not_followed(
    hub: FakeHub, census: Path
) -> None:
    call("lock", census)
    hub.commit = MOVED
    hub.requests.clear()
    answer = call("plan", census, "--run", census.parent / "run")
    assert answer.code == 0
    assert "2 units to do" in answer.err
    assert commits(found(census)) == {COMMIT}
    assert hub.requests == []


def test_locking_again_keeps_what_is_locked_and_adds_what_is_missing(
    hub: FakeHub, census: Path
) -> None:
    write_census(census, FIRST)
    call("lock", census)
    hub.commit = MOVED
    hub.requests.clear()
    write_census(census, FIRST, SECOND)
    states = {r["name"]: (r["state"], r["commit"]) for r in call("lock", census, "--json").records}
    assert states == {FIRST: ("locked", COMMIT), SECOND: ("added", MOVED)}
    assert [path for _, path in hub.requests] == [f"/api/models/timm/{SECOND}"]


def test_update_takes_the_current_commits_and_says_which_moved(hub: FakeHub, census: Path) -> None:
    call("lock", census)
    hub.commit = MOVED
    answer = call("lock", census, "--update")
    assert answer.code == 0
    assert answer.err.count(f"from {COMMIT}") == 2
    assert commits(found(census)) == {MOVED}
    assert call("lock", census, "--update").out.count("moved") == 0


def test_names_that_cannot_be_had_are_rows_and_the_rest_is_locked(
    hub: FakeHub, census: Path
) -> None:
    write_census(census, FIRST, "test_vit2.r160_in1k")
    answer = call("lock", census, "--json")
    assert answer.code == 3
    assert [r["state"] for r in answer.records] == ["added", "failed"]
    assert "no such repository" in answer.records[1]["reason"]
    assert list(read_lock(census.with_suffix(".lock.json")).files) == [f"timm:{FIRST}"]


def test_a_name_that_fails_in_an_update_stays_as_it_was(hub: FakeHub, census: Path) -> None:
    call("lock", census)
    before = census.with_suffix(".lock.json").read_bytes()
    hub.faults = [Fault("/api/models/", status=403, times=99)]
    answer = call("lock", census, "--update")
    assert (answer.code, "0 of 2 locked" in answer.err) == (3, True)
    assert census.with_suffix(".lock.json").read_bytes() == before


def test_the_manifests_lock_goes_before_the_runs_and_a_revision_before_both(
    hub: FakeHub, census: Path
) -> None:
    first = found(census)
    keep(first.files, open_store(census.parent / "run"))
    hub.commit = MOVED
    assert commits(found(census)) == {COMMIT}, "the run's"
    call("lock", census)
    assert commits(found(census)) == {MOVED}, "the manifest's"
    write_census(census, FIRST, SECOND, revision="main")
    hub.commit = "e" * 40
    assert commits(found(census)) == {"e" * 40}, "the revision's, which no lock knows yet"
    call("lock", census)
    hub.commit = "d" * 40
    assert commits(found(census)) == {"e" * 40}, "locked now"
    # Each update reaches the run too, so that it can be resumed without the manifest.
    keep(found(census).files, open_store(census.parent / "run"))
    kept = run_lock(open_store(census.parent / "run")).files
    assert kept[f"timm:{FIRST}@main"][0].commit == "e" * 40
    assert kept[f"timm:{FIRST}"][0].commit == COMMIT


def test_a_commit_that_vanished_is_said_by_the_one_who_needs_it(hub: FakeHub, census: Path) -> None:
    from pipeline.download import download

    call("lock", census)
    hub.commit = MOVED  # and the old one is gone from the server
    (file,) = read_lock(census.with_suffix(".lock.json")).files[f"timm:{FIRST}"]
    with pytest.raises(HubError, match=r"at 0123456789ab: no such revision"):
        download(file)


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"null", b'{"lock_version": 9}', b'{"lock_version": 1}',
        b'{"lock_version": 1, "files": {"timm:x": [{"repo_id": "r"}]}}', b'{"name": 1}', b"\xff",
    ],
)  # fmt: skip
def test_a_damaged_lock_is_a_clear_error(census: Path, content: bytes) -> None:
    place = census.with_suffix(".lock.json")
    place.write_bytes(content)
    with pytest.raises(StoreError, match=r"census\.lock\.json is damaged .*delete it"):
        read_lock(place)
    for command in ("plan", "lock", "fetch"):
        answer = call(command, census)
        assert (answer.code, "is damaged" in answer.err) == (4, True), command


@pytest.mark.parametrize(
    ("repo", "commit", "filename", "kind"),
    [
        ("timm/x", "c" * 40, "../../../x.safetensors", "model"),
        ("timm/x", "c" * 40, "/x.safetensors", "model"),
        ("timm/x", "..", "x.safetensors", "dataset"),
        ("https://x.org", "0123abcd", "../../x-0123abcd.pth", "url"),
        ("https://x.org", "", "x-0123abcd.pth", "url"),
    ],
)
def test_a_lock_that_leads_out_of_the_cache_is_refused(
    tmp_path: Path, repo: str, commit: str, filename: str, kind
) -> None:
    write_lock(
        tmp_path / "m.lock.json",
        Lock({"timm:x": (HubFile(repo, commit, filename, 1, None, kind),)}),
    )
    with pytest.raises(StoreError, match="no file of the cache"):
        read_lock(tmp_path / "m.lock.json")


def test_locks_with_any_records_survive_the_file(tmp_path: Path) -> None:
    web = url_file("https://x.org/a/b-0123abcd.pth")
    assert web is not None
    data = tuple(HubFile("o/r", "c" * 40, f"{n}.parquet", n, None, "dataset") for n in range(3))
    lock = Lock({"timm:a": (web,), "data:o/r/train": data}, {"old": "c" * 40})
    write_lock(tmp_path / "m.lock.json", lock)
    assert read_lock(tmp_path / "m.lock.json") == lock
    assert json.loads((tmp_path / "m.lock.json").read_bytes())["lock_version"] == 1
    assert identified(web.identity) == web


def test_a_hub_that_does_not_answer_stops_the_asking_and_a_plan_is_whole_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty names cost what one costs: those that begin at once, and no more."""
    from timm import list_models

    names = list_models("vit_tiny*", pretrained=True) + list_models("vit_small*", pretrained=True)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    answer = call("lock", write_census(tmp_path / "c.toml", *names), "--json")
    assert answer.code == 3
    reasons = [r["reason"] for r in answer.records]
    assert len(reasons) == len(names) > 12
    tried = sum("cannot reach http://127.0.0.1:9 after" in reason for reason in reasons)
    assert tried <= 8 + patience.FAILURES_IN_A_ROW
    assert sum("not tried" in reason for reason in reasons) == len(names) - tried

    census = write_census(tmp_path / "c.toml", *names[:2])
    answer = call("plan", census, "--run", tmp_path / "run")
    assert answer.code == 0
    assert "weights not locked: the hub could not be asked" in answer.err
    assert "2 units to do" in answer.err
    assert not (tmp_path / "run").exists()
    answer = call("fetch", census, "--run", tmp_path / "run", "--dry-run")
    assert answer.code == 3
    assert "about 22.9 MB" in answer.out, "5.7 M parameters of vit_tiny at 4 bytes"
    answer = call("launch", census, "--run", tmp_path / "run", "--on", "inline")
    assert answer.code == 3
    assert not (tmp_path / "run/shards").exists()
