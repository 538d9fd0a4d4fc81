"""A few random faults and bit flips; ``make campaign`` does hundreds and ten thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]


def campaign(folder: Path, *options: object) -> list[dict]:
    """Run a campaign of one episode, which must break no promise."""
    out = folder / "campaign.jsonl"
    command = [sys.executable, "-m", "tests.campaigns", *map(str, options), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--flips" in options:
        assert " noticed" in done.stdout
        assert " silent" not in done.stdout
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_three_hundred_bit_flips_and_some_faults_without_ray(tmp_path: Path):
    (episode,) = campaign(tmp_path, "--flips", 300, "--episodes", 1, "--place", "inline")
    assert len(episode["faults"]) >= 4
    assert episode["rows"] == [0, 0]


@pytest.mark.ray
def test_killed_and_stopped_workers_and_slots(tmp_path: Path):
    kinds = ["child killed", "child stopped", "slot killed", "driver killed", "out of memory"]
    (episode,) = campaign(tmp_path, "--episodes", 1, "--place", "local", "--only", *kinds)
    assert len(episode["faults"]) >= 4
    assert episode["rows"] == [0, 0]
