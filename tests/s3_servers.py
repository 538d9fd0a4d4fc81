"""Real servers that speak S3, on free ports of the loopback, each a process of its own.

``moto`` and ``ministack`` honour conditional writes; ``rclone serve s3`` is here for what it lacks.
All come with the ``dev`` extra. A server that is not installed skips the test and says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ACCESS_KEY, SECRET_KEY = "AKIDEXAMPLEEXAMPLE00", "wJalrXUtnFEMIexampleexampleSECRETKEY"
BUCKET = "census"
CONDITIONAL = ("moto", "ministack")  # pass the probe
OVERWRITING = ("rclone",)  # must not
START_SECONDS = 60.0


@contextlib.contextmanager
def s3_server(name: str, folder: Path) -> Iterator[str]:
    """Run a server with an empty bucket BUCKET. Yields its address, such as http://127.0.0.1:4711.

    Args:
        name: One of CONDITIONAL or OVERWRITING.
        folder: An empty directory for its data and its log.
    """
    port = free_port()
    command, environment = _command(name, port, folder)
    folder.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        _wait(server, address, folder / "server.log")
        make_bucket(address)
        yield address
    finally:
        server.kill()
        server.wait()


def s3_environment(address: str) -> dict[str, str]:
    """What a client's environment has to say about a server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
    }


def use_s3(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Point this process, and those that it starts, to a server."""
    for variable, value in s3_environment(address).items():
        monkeypatch.setenv(variable, value)


def make_bucket(address: str, name: str = BUCKET) -> None:
    """Create a bucket. The servers do not check signatures, so none is made."""
    request = urllib.request.Request(f"{address}/{name}", method="PUT")
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=20):
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command(name: str, port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    if name == "moto":
        _require(name, importlib.util.find_spec("moto") and importlib.util.find_spec("flask"))
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], {}
    if name == "ministack":
        _require(name, importlib.util.find_spec("ministack"))
        return [sys.executable, "-m", "ministack"], {
            "GATEWAY_PORT": str(port),
            "BIND_HOST": "127.0.0.1",
            "SERVICES": "s3",
            "S3_DATA_DIR": str(folder / "data"),
            "LOG_LEVEL": "WARNING",
        }
    assert name == "rclone", name
    beside = Path(sys.executable).with_name("rclone")
    rclone = str(beside) if beside.is_file() else shutil.which("rclone")
    _require(name, rclone)
    (folder / "data" / BUCKET).mkdir(parents=True)
    return [
        str(rclone), "serve", "s3", str(folder / "data"), "--addr", f"127.0.0.1:{port}",
        "--config", str(folder / "none.conf"),
    ], {}  # fmt: skip


def _require(name: str, found: object) -> None:
    if not found:
        pytest.skip(f"NOT TESTED against {name}: pip install 'flatcensus[dev]' brings it")


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Until the server answers anything at all."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{server.args} does not answer: {log.read_text()[-2000:]}")
