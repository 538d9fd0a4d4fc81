"""``flatcensus lock``: the lock of a manifest, completed or brought up to date."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.entries import Manifest
from pipeline.hub_file import HubFile
from pipeline.hub_names import find_images, find_weights
from pipeline.lock import Lock, lock_path, read_lock, write_lock


@dataclass(frozen=True)
class Line:
    """What became of one name."""

    name: str
    files: tuple[HubFile, ...]
    state: Literal["locked", "added", "moved", "failed"]
    reason: str = ""

    def record(self) -> dict[str, object]:
        """The line as columns."""
        first = self.files[0] if self.files else None
        sizes = [file.size for file in self.files]
        return {
            "name": self.name,
            "repository": first.repo_id if first else "",
            "commit": first.commit if first else "",
            "bytes": None if None in sizes or not sizes else sum(size or 0 for size in sizes),
            "sha256": first.sha256 if first and len(self.files) == 1 else None,
            "state": self.state,
            "reason": self.reason,
        }


def lock_manifest(manifest: Manifest, path: Path, *, update: bool) -> tuple[list[Line], Path]:
    """Lock what the manifest names on the hub and its lock does not hold yet.

    Args:
        manifest: What to lock.
        path: Its file; the lock is written beside it.
        update: Ask the hub for everything. A name that cannot be had now stays as it was.

    Raises:
        StoreError: If the lock is damaged or cannot be written.
    """
    place = lock_path(path)
    old = read_lock(place)
    lines, files = [], dict[str, tuple[HubFile, ...]]()
    for name, key, found in _found(manifest, Lock() if update else old):
        before = old.files.get(key)
        if isinstance(found, tuple):
            files[key] = found
            state = "added" if before is None else "locked" if before == found else "moved"
            reason = _moved(before, found) if before and state == "moved" else ""
            lines.append(Line(name, found, state, reason))
        else:
            lines.append(Line(name, before or (), "failed", str(found)))
    new = old | Lock(files)
    if new != old:
        write_lock(place, new)
    return lines, place


def _moved(before: Sequence[HubFile], now: Sequence[HubFile]) -> str:
    same = [file.content for file in before] == [file.content for file in now]
    return f"from {before[0].commit}" + (", the same content: nothing is stale" if same else "")


def _found(
    manifest: Manifest, lock: Lock
) -> Iterator[tuple[str, str, tuple[HubFile, ...] | Exception]]:
    for weights in find_weights(manifest, lock):
        file = weights.file
        yield weights.name, weights.key, (file,) if isinstance(file, HubFile) else file
    for images in find_images(manifest, lock):
        yield images.name, images.key, images.files
