"""The cache of downloads on this machine: what it holds, what is left of broken ones, what fits.

Hub files are where huggingface_hub keeps them (``HF_HUB_CACHE``, by default below ``HF_HOME``);
files of web addresses are beside them in ``flatcensus/``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock

from pipeline.durations import size
from pipeline.errors import StoreError
from pipeline.hub_file import HubFile

WEB_FOLDER = "flatcensus"
RESERVE_BYTES = 256 * 2**20  # left free on the disk of the cache: chosen


def cached(file: HubFile) -> Path | None:
    """Where the cache has a file, None if it has not. Its bytes are not checked."""
    path = place(file)
    return path if path.is_file() else None


def place(file: HubFile) -> Path:
    """Where the cache keeps a file."""
    root = Path(constants.HF_HUB_CACHE)
    if file.repo_type == "url":
        return root / WEB_FOLDER / file.filename
    return _folder(file) / "snapshots" / file.commit / file.filename


def free_bytes() -> int:
    """Free space on the disk of the cache, which need not exist yet."""
    root = Path(constants.HF_HUB_CACHE).absolute()
    while not root.is_dir() and root != root.parent:
        root = root.parent
    return shutil.disk_usage(root).free


def fits(files: Iterable[HubFile]) -> bool:
    """Whether files of known size find room and leave the reserve free."""
    return free_bytes() >= sum(file.size or 0 for file in files) + RESERVE_BYTES


def require_space(file: HubFile) -> None:
    """Raise StoreError if a file does not fit on the disk of the cache."""
    if file.size is not None and not fits([file]):
        raise StoreError(
            f"{file.what}: needs {size(file.size)} and {size(RESERVE_BYTES)} in reserve, but the "
            f"disk of the cache {constants.HF_HUB_CACHE} has {size(free_bytes())} free. Free some, "
            "or set HF_HOME to a folder on a larger disk; what is complete is kept.",
            disk_full=True,
        )


def remove_leftovers(file: HubFile) -> None:
    """Delete what killed downloads of a hub file left: nothing would ever take them up again.

    huggingface_hub downloads under its lock into a file with a random name. If the lock is free,
    nobody is writing these files.
    """
    if file.repo_type == "url" or not file.sha256:
        return
    left = list((_folder(file) / "blobs").glob(f"{file.sha256}.*.incomplete"))
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / _folder(file).name
    if not left or not locks.is_dir():
        return
    # A lock that is held, or cannot be had: somebody may be downloading this very file.
    with (
        contextlib.suppress(OSError),
        WeakFileLock(locks / f"{file.sha256}.lock", timeout=0.1),
    ):
        for path in left:
            path.unlink(missing_ok=True)


def _folder(file: HubFile) -> Path:
    name = repo_folder_name(repo_id=file.repo_id, repo_type=file.repo_type)
    return Path(constants.HF_HUB_CACHE) / name
