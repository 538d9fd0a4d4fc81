"""``flatcensus fetch``: what a launch needs, ahead of it, in a cache that others share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import call
from fake_hub import FakeHub, Fault
from hub_world import NAMES, WEIGHTS, point, served, weights, write_census
from huggingface_hub import constants

from pipeline import fetch as fetching
from pipeline import hub_cache, patience
from pipeline.errors import HubError
from pipeline.hub_file import HubFile, url_file
from pipeline.patience import Circuit

MISSING = "test_vit2.r160_in1k"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.0)
    with served(*NAMES) as server:
        point(server, monkeypatch, tmp_path)
        yield server


def fetch(census: Path, *options: str):
    return call("fetch", census, "--run", census.parent / "run", *options)


def states(answer) -> dict[str, str]:
    return {r["checkpoint"]: r["state"].partition(":")[0] for r in answer.records}


def test_a_dry_run_shows_sizes_and_downloads_nothing(hub: FakeHub, tmp_path: Path) -> None:
    census = write_census(tmp_path / "c.toml", *NAMES)
    answer = fetch(census, "--dry-run", "--json")
    assert answer.code == 0
    sizes = {r["checkpoint"]: r["bytes"] for r in answer.records}
    assert sizes == {name: len(weights(name)) for name in NAMES}
    assert set(states(answer).values()) == {"to fetch"}
    assert hub.begun == []
    assert f"cache: {tmp_path / 'cache'}" in answer.err
    assert not (tmp_path / "run").exists()


def test_fetched_once_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    census = write_census(tmp_path / "c.toml", *NAMES)
    call("lock", census)
    answer = fetch(census, "--json")
    assert (answer.code, set(states(answer).values())) == (0, {"fetched"})
    assert answer.next_step.startswith("flatcensus launch ")
    hub.requests.clear()
    answer = fetch(census, "--json")
    assert (answer.code, set(states(answer).values())) == (0, {"cached"})
    assert hub.requests == []


def test_what_fails_is_a_row_and_the_rest_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.files[f"timm/{MISSING}"] = {WEIGHTS: b"will be gone"}
    census = write_census(tmp_path / "c.toml", *NAMES[:2], MISSING)
    call("lock", census)
    del hub.files[f"timm/{MISSING}"]
    hub.faults = [
        Fault(f"/timm/{NAMES[1]}/", method="HEAD", status=403, times=99),
    ]
    answer = fetch(census, "--json")
    assert answer.code == 3
    assert states(answer) == {NAMES[0]: "fetched", NAMES[1]: "failed", MISSING: "failed"}
    assert "HF_TOKEN" in next(r["state"] for r in answer.records if r["checkpoint"] == NAMES[1])
    hub.faults.clear()
    assert states(fetch(census, "--json"))[NAMES[1]] == "fetched", "the same command continues"


def test_a_rotten_file_is_found_and_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    census = write_census(tmp_path / "c.toml", NAMES[0])
    fetch(census)
    (path,) = (tmp_path / "cache").rglob(WEIGHTS)
    path.write_bytes(b"rot")
    assert fetch(census).code == 0
    assert path.read_bytes() == weights(NAMES[0])


def test_offline_what_is_missing_is_named(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    census = write_census(tmp_path / "c.toml", *NAMES[:2])
    call("lock", census)
    fetch(write_census(tmp_path / "one.toml", NAMES[0]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for option in ("--dry-run", "--json"):
        answer = fetch(census, "--json", option)
        assert answer.code == 3
        assert states(answer) == {NAMES[0]: "cached", NAMES[1]: "failed"}
        assert "HF_HUB_OFFLINE is set" in answer.out
    assert f"{NAMES[1]}: " in fetch(census, "--dry-run").err
    assert hub.requests == []


def test_a_full_disk_stops_cleanly_and_keeps_what_is_complete(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    census = write_census(tmp_path / "c.toml", *NAMES)
    call("lock", census)
    fetch(write_census(tmp_path / "one.toml", NAMES[0]))
    monkeypatch.setattr(hub_cache, "free_bytes", lambda: hub_cache.RESERVE_BYTES)
    answer = fetch(census, "--json")
    assert answer.code == 4
    assert "MB and 268 MB in reserve" in answer.err
    assert "are missing, more than is free" not in answer.err
    found = states(answer)
    assert (found[NAMES[0]], found[NAMES[1]], found[NAMES[2]]) == ("cached", "to fetch", "to fetch")
    assert answer.next_step.startswith("flatcensus fetch ")


def test_several_failures_in_a_row_open_the_circuit_and_an_answer_closes_it() -> None:
    circuit, calls = Circuit(), []

    def silent() -> None:
        calls.append(1)
        raise HubError("nobody", unasked=True)

    def refused() -> None:
        raise HubError("no")

    for _ in range(patience.FAILURES_IN_A_ROW - 1):
        with pytest.raises(HubError, match="nobody"):
            circuit.call(silent, what="x")
    with pytest.raises(HubError, match="no"):  # an answer, if not the wished one
        circuit.call(refused, what="x")
    for _ in range(patience.FAILURES_IN_A_ROW):
        with pytest.raises(HubError, match="nobody"):
            circuit.call(silent, what="x")
    before = len(calls)
    with pytest.raises(HubError, match=r"x: not tried, because .* did not answer"):
        circuit.call(silent, what="x")
    assert len(calls) == before


def test_a_silent_web_server_does_not_keep_the_hub_from_being_asked(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(file: HubFile) -> Path:
        asked.append(file)
        if file.repo_type == "url":
            raise HubError("nobody", unasked=True)
        return Path(__file__)

    monkeypatch.setattr(fetching, "download", answer)
    monkeypatch.setattr(fetching, "NUM_THREADS", 1)
    web = [url_file(f"https://silent.org/{n}-0123abcd.pth") for n in "abcd"]
    files = [*(file for file in web if file), HubFile("timm/x", "c" * 40, WEIGHTS, 1, None)]
    wanted = [fetching.Wanted(f.filename, (f,), 1, False, "to fetch") for f in files]
    results, _ = fetching.fetch(wanted, lambda item: None)
    assert [r.state for r in results] == ["failed"] * 4 + ["fetched"]
    assert len(asked) == patience.FAILURES_IN_A_ROW + 1
    assert "silent.org did not answer" in results[3].reason
