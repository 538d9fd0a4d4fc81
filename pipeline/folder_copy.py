"""Copies of folders of an object store on this machine, for readers that need files.

Copies lie in the user's cache (``XDG_CACHE_HOME``, else ``~/.cache``) below ``flatcensus/folders``
and may be deleted at any time. A copy is named by what the store lists, so a rewritten object makes
another copy; it appears whole by a rename, and is checked by its digests each time it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.errors import StoreError

_DIGESTS = "digests.json"


def local_copy(
    address: str, files: Sequence[tuple[str, str]], read: Callable[[str], bytes]
) -> Path:
    """A directory with the files of a folder, copied unless a sound copy is here already.

    Args:
        address: The folder's URI. Its last part becomes the directory's name.
        files: Name below the folder and stamp of each file.
        read: Gives a file's bytes, already checked.

    Raises:
        StoreError: ``read`` did, or the cache cannot be written.
    """
    named = hashlib.sha256(json.dumps([address, sorted(files)]).encode()).hexdigest()[:32]
    place, folder = _root() / named, address.rpartition("/")[2]
    if not _is_sound(place, folder, [name for name, _ in files]):
        try:
            _copy(place, folder, [name for name, _ in files], read)
        except OSError as error:
            raise StoreError(
                f"cannot copy {address} to {place.parent}: {error.strerror}. Free some space there "
                "or set XDG_CACHE_HOME to a folder elsewhere. Then run the same command again.",
                disk_full=error.errno in (errno.ENOSPC, errno.EDQUOT),
            ) from error
    return place / folder


def _root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatcensus/folders"


def _is_sound(place: Path, folder: str, names: Sequence[str]) -> bool:
    """Whether a copy holds these files with the digests that were noted when it was made."""
    try:
        digests = json.loads((place / _DIGESTS).read_bytes())
        return sorted(digests) == sorted(names) and all(
            _sha256(place / folder / name) == digests[name] for name in names
        )
    except (OSError, ValueError):
        return False


def _copy(place: Path, folder: str, names: Sequence[str], read: Callable[[str], bytes]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=place.parent) as temporary:
        aside = Path(temporary) / place.name
        (aside / folder).mkdir(parents=True)
        digests = {}
        for name in names:
            file = aside / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            data = read(name)
            file.write_bytes(data)
            digests[name] = hashlib.sha256(data).hexdigest()
        (aside / _DIGESTS).write_text(json.dumps(digests))
        while True:
            try:
                aside.rename(place)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if _is_sound(place, folder, names):
                return  # another process was faster
            _set_aside(place, Path(temporary) / "damaged")


def _set_aside(place: Path, damaged: Path) -> None:
    """Move a damaged copy away; it may be gone already."""
    shutil.rmtree(damaged, ignore_errors=True)
    try:
        place.rename(damaged)
    except FileNotFoundError:
        pass


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
