"""Secrets of the environment stay there, and a launch opens no door to this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import pytest
from populations import save_mlp, write_manifest
from processes import descendants, flatcensus, wait_for, workers

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECRETS = {
    name: f"{start}SeNtInEl{number}"
    for number, (name, start) in enumerate(
        {
            "HF_TOKEN": "hf_", "HUGGING_FACE_HUB_TOKEN": "hf_", "AWS_ACCESS_KEY_ID": "AKIA",
            "AWS_SECRET_ACCESS_KEY": "", "AWS_SESSION_TOKEN": "", "RAY_AUTH_TOKEN": "",
        }.items()
    )
}  # fmt: skip


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs; the names of its sockets must be short."""
    folder = Path(tempfile.mkdtemp(prefix="fc-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def addresses(pid: int) -> set[tuple[str, int]]:
    """Where a process and its descendants listen."""
    listening: dict[str, tuple[str, int]] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state == "0A":
            address, port = local.split(":")
            parts = [str(int(address[i : i + 2], 16)) for i in (6, 4, 2, 0)]
            host = ".".join(parts).replace("0.0.0.0", "127.0.0.1")
            listening[rest[5]] = (host, int(port, 16))
    found = set()
    for process in (pid, *descendants(pid)):
        try:
            links = [os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir()]
        except OSError:
            continue  # it ended while we looked
        inodes = {m[1] for link in links if (m := re.fullmatch(r"socket:\[(\d+)]", link))}
        found |= {listening[inode] for inode in inodes if inode in listening}
    return found


def takes_a_job(host: str, port: int, marker: Path) -> bool:
    """Whether somebody without the token can have a command run through this port."""
    body = json.dumps({"entrypoint": f"touch {marker}"}).encode()
    for path in ("/api/jobs/", "/api/job_agent/jobs/"):
        request = urllib.request.Request(
            f"http://{host}:{port}{path}", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=2):
                return True
        except (OSError, HTTPException):  # refused, or no HTTP at all
            continue
    return False


def test_no_secret_is_written_and_no_stranger_may_run_a_job(tmp_path: Path, ray_folder: Path):
    """Of a launch on Ray with a crash, a checkpoint that fails and every kind of output."""
    save_mlp(tmp_path / "checkpoints/sound")
    shutil.copytree(tmp_path / "checkpoints/sound", tmp_path / "checkpoints/cut")
    cut = tmp_path / "checkpoints/cut/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    manifest = write_manifest(
        tmp_path / "m.toml", samples=96, resources="unit_seconds = 1e-6\nmax_slots = 1"
    )
    environment = os.environ | SECRETS | {"RAY_TMPDIR": str(ray_folder)}
    run = tmp_path / "run"
    process = flatcensus("launch", manifest, "--run", run, "--json", env=environment)
    wait_for(lambda: workers(process.pid) or process.poll() is not None, what="a worker")
    for host, port in addresses(process.pid):
        assert not takes_a_job(host, port, tmp_path / "ran"), (host, port)
    assert not [port for _, port in addresses(process.pid) if port == 8265], "no dashboard"
    texts = list(process.communicate(timeout=200))
    assert process.returncode == 3, texts[1]
    for command in ("status", "query", "report", "verify", "plan"):
        target = manifest if command == "plan" else run
        done = flatcensus(command, target, "--json", env=environment)
        texts += done.communicate(timeout=100)
    assert not (tmp_path / "ran").exists()
    written = [p for folder in (run, ray_folder) for p in folder.rglob("*") if p.is_file()]
    assert any("logs" in path.parts for path in written), "Ray's logs are among them"
    for name, secret in SECRETS.items():
        assert not [text for text in texts if secret in text], name
        assert not [path for path in written if secret.encode() in path.read_bytes()], name
