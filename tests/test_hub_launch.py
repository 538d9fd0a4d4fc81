"""A census of pretrained models from the command line alone, against a hub on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from fake_hub import Fault
from hub_world import NAMES, TOKEN, WEIGHTS, environment, served, write_census
from processes import flatcensus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MISSING = "test_vit2.r160_in1k"


def run(folder: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    process = flatcensus(*arguments, env=env, cwd=folder)
    out, err = process.communicate(timeout=300)
    assert TOKEN not in out + err, arguments
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def no_token_below(folder: Path) -> bool:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return not [path for path in found if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("on", ["inline", pytest.param("local", marks=pytest.mark.ray)])
def test_lock_fetch_launch_status(tmp_path: Path, on: str) -> None:
    census = write_census(tmp_path / "census.toml", *NAMES[:2], MISSING, resources="max_slots = 2")
    with served(*NAMES[:2]) as hub:
        env = environment(hub, tmp_path)
        done = run(tmp_path, env, "lock", "census.toml")
        assert done.returncode == 3, done.stderr
        assert "2 of 3 locked in census.lock.json" in done.stderr
        assert f"{MISSING}" in done.stdout
        assert "no such repository" in done.stderr
        census.write_text(census.read_text().replace(f", '{MISSING}'", ""))
        done = run(tmp_path, env, "fetch", "census.toml", "--dry-run")
        assert (done.returncode, "2 to fetch (" in done.stderr) == (0, True), done.stderr
        assert hub.begun == []
        done = run(tmp_path, env, "fetch", "census.toml")
        assert (done.returncode, "2 fetched (" in done.stderr) == (0, True), done.stderr
        hub.requests.clear()
        hub.commit = "f" * 40  # the branches move on
        done = run(tmp_path, env, "launch", "census.toml", "--on", on)
        assert done.returncode == 0, done.stderr
        assert "2 units committed, 0 failed" in done.stderr
        assert run(tmp_path, env, "status", "runs/census").returncode == 0
        assert hub.requests == [], "locked and fetched: nobody is asked"
        assert (tmp_path / "runs/census/hub.lock.json").read_bytes() == (
            tmp_path / "census.lock.json"
        ).read_bytes()
    assert no_token_below(tmp_path)


@pytest.mark.ray
def test_a_node_of_ray_fetches_ahead_while_its_slot_computes(tmp_path: Path) -> None:
    two_units = 'max_slots = 1\n[[measurements]]\nmetric = "accuracy"'
    census = write_census(tmp_path / "census.toml", *NAMES, resources=two_units)
    with served(*NAMES) as hub:
        done = run(tmp_path, environment(hub, tmp_path), "launch", census.name)
        assert done.returncode == 0, done.stderr
        assert "6 units committed, 0 failed" in done.stderr
        assert hub.bodies(WEIGHTS) == len(NAMES), "each file once"
        begun = sorted(moment for moment, _ in hub.begun)
    units = run(tmp_path, dict(os.environ), "query", "runs/census", "units", "--json")
    ended = sorted(
        datetime.fromisoformat(json.loads(line)["finished_at"]).timestamp()
        for line in units.stdout.splitlines()
    )
    # A slot that fetched for itself would begin with the second when the first is measured.
    assert begun[1] < ended[1]
    assert begun[2] < ended[3]


def test_the_token_is_nowhere_even_when_the_hub_refuses(tmp_path: Path) -> None:
    """Listing, redirect and content fail in turn, with headers that repeat the token."""
    write_census(tmp_path / "census.toml", *NAMES, MISSING)
    echo = {"WWW-Authenticate": f"Bearer {TOKEN}", "X-Error-Message": f"Bad token {TOKEN}"}
    with served(*NAMES) as hub:
        hub.faults = [
            Fault(f"/api/models/timm/{NAMES[0]}", status=403, headers=echo, times=99),
            Fault(f"/timm/{NAMES[1]}/resolve", method="HEAD", status=401, headers=echo, times=99),
        ]
        done = run(tmp_path, environment(hub, tmp_path), "launch", "census.toml", "--on", "inline")
        assert done.returncode == 3, done.stderr
        assert {token for _, token in hub.tokens if token} == {f"Bearer {TOKEN}"}
        failures = run(tmp_path, environment(hub, tmp_path), "query", "runs/census", "failures")
        for name in (NAMES[0], NAMES[1], MISSING):
            assert name in failures.stdout
    assert "1 unit committed" in done.stderr
    assert no_token_below(tmp_path / "runs")
