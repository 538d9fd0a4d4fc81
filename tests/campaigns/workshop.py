"""What all episodes share: a copy of the sources, networks, a clock that can be wrong."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

from populations import save_mlp

ROOT = Path(__file__).parents[2]
FOLDER = "FLATCENSUS_CAMPAIGN"  # environment: the folder of the present episode
CLOCK = "FLATCENSUS_CLOCK"  # environment: file with the seconds by which the clock is wrong
NUM_NETWORKS = 5


def prepare(folder: Path) -> dict[str, str]:
    """Fill the folder of a workshop. Returns the environment for everything that uses it."""
    sources = folder / "sources"
    for name in ("pipeline", "tasks", "tests"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for seed in range(NUM_NETWORKS):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    (folder / "clock").write_bytes(struct.pack("q", 0))
    environment = os.environ | {
        "PYTHONPATH": f"{sources}:{sources / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "FLATCENSUS_DEBUG": "1",  # tracebacks
        FOLDER: str(folder / "world"),
        CLOCK: str(folder / "clock"),
        "RAY_TMPDIR": str(folder / "r"),
    }
    if shutil.which("cc"):
        library, source = folder / "clock.so", Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        environment["LD_PRELOAD"] = str(library)
    return environment


class Workshop:
    """The folder that ``prepare`` has filled, from inside."""

    def __init__(self) -> None:
        self.world = Path(os.environ[FOLDER])
        self.clock = Path(os.environ[CLOCK])
        self.has_wrong_clock = "LD_PRELOAD" in os.environ

    def set_clock(self, seconds: int) -> None:
        """Let the wall clock of all processes be wrong by so much, from now on."""
        with self.clock.open("r+b") as file:
            file.write(struct.pack("q", seconds))


def end_orderly() -> None:
    """Let SIGTERM end this process like an exception, once, so that nothing is left behind."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
