"""SHA-256 of files, remembered between processes by size and time of modification.

Who loads a data set must know that its files are those of the plan. Reading them all each time
would take longer than measuring, so large sets are hashed once per machine: what was found lies in
``~/.cache/flatcensus/digests``, one file per folder, with a checksum of its own. A file that is
damaged or cannot be written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MEMORY = Path.home() / ".cache/flatcensus/digests"
WORTH_FILES = 500  # below both of these, reading again takes a fraction of a second: chosen
WORTH_BYTES = 64 * 2**20
SETTLED_SECONDS = 2.0  # a file that is younger may change again within its time stamp's grain
THREADS = 8  # network file systems answer slowly, but many at once: chosen
_CHUNK = 64

Seen = tuple[str, int, int]  # digest, size in bytes, time of modification in ns


def content_digests(folder: Path, names: Sequence[str]) -> list[str]:
    """SHA-256 of each file, in hexadecimal.

    Args:
        folder: Where they lie.
        names: Their paths in it.

    Raises:
        OSError: If one is missing or unreadable.
    """
    stats = [os.stat(os.path.join(folder, name)) for name in names]
    worth = len(names) >= WORTH_FILES or sum(s.st_size for s in stats) >= WORTH_BYTES
    known = _remembered(folder) if worth else {}
    found: dict[str, Seen] = {}
    unknown: list[str] = []
    for name, stat in zip(names, stats, strict=True):
        seen = known.get(name)
        if seen is not None and seen[1:] == (stat.st_size, stat.st_mtime_ns):
            found[name] = seen
        else:
            unknown.append(name)
    if unknown:
        chunks = [unknown[i : i + _CHUNK] for i in range(0, len(unknown), _CHUNK)]
        with ThreadPoolExecutor(THREADS) as pool:
            for chunk in pool.map(lambda part: [_digest(folder, name) for name in part], chunks):
                found.update(chunk)
        if worth:
            settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
            _remember(folder, known | {n: s for n, s in found.items() if s[2] < settled})
    return [found[name][0] for name in names]


def forget(folder: Path) -> None:
    """Read the files of this folder anew next time: one of them is not what was remembered."""
    with contextlib.suppress(OSError):
        _place(folder).unlink()


def _digest(folder: Path, name: str) -> tuple[str, Seen]:
    with open(os.path.join(folder, name), "rb") as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return name, (digest, stat.st_size, stat.st_mtime_ns)


def _place(folder: Path) -> Path:
    return MEMORY / hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:32]


def _remembered(folder: Path) -> dict[str, Seen]:
    try:
        content = _place(folder).read_bytes()
    except OSError:
        return {}
    checksum, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return {}
    records = (record.split(" ", 3) for record in os.fsdecode(body).split("\0") if record)
    return {name: (digest, int(size), int(mtime)) for digest, size, mtime, name in records}


def _remember(folder: Path, seen: dict[str, Seen]) -> None:
    """Write aside and rename: of two writers at once the last wins, and both are right."""
    records = (f"{digest} {size} {mtime} {name}" for name, (digest, size, mtime) in seen.items())
    body = os.fsencode("\0".join(records))
    path = _place(folder)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.replace(aside, path)
    except OSError:  # no home, or no space: the files are read again next time
        with contextlib.suppress(OSError):
            aside.unlink()
