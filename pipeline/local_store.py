"""The run folder on a POSIX file system, local or shared (NFS, Lustre).

Nothing half-written is ever visible under a key: data is written aside under a hidden name in the
same directory, flushed to disk, then linked or renamed to its own name.

Trade-offs: each publication waits for the disk twice (file, directory). A process killed between
two steps leaves a hidden temporary file, which no listing shows and ``clean_temporaries`` removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StoreError
from pipeline.store import PROBE, Entry, MissingKeyError, validated

_TEMPORARY = ".tmp-"
_TRIES = 5  # to make a directory that others keep removing: chosen
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class LocalStore:
    """A directory as a Store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def uri(self) -> str:
        """The directory."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """The file of this key, whether or not it exists. Raises StoreError where a link leads."""
        path = str(self.root)
        for segment in validated(key).split("/"):
            path = f"{path}/{segment}"
            if os.path.islink(path):  # a stranger's run folder could lead us anywhere
                raise StoreError(_sentence("use", Path(path), _LINK))
        return Path(path)

    def put_new(self, key: str, data: bytes) -> bool:
        """See Store."""
        final = self.path(key)
        with _explained("create", final), _written_aside(final, data) as temporary:
            created = _link(temporary, final)
            temporary.unlink()
            _fsync_directory(final.parent)
            return created

    def put(self, key: str, data: bytes) -> None:
        """See Store."""
        final = self.path(key)
        with _explained("write", final), _written_aside(final, data) as temporary:
            temporary.replace(final)
            _fsync_directory(final.parent)

    def get(self, key: str) -> bytes:
        """See Store."""
        path = self.path(key)
        with _explained("read", path):
            return path.read_bytes()

    def exists(self, key: str) -> bool:
        """See Store."""
        path = self.path(key)
        with _explained("look at", path):
            return path.is_file()

    def list(self, prefix: str = "") -> list[str]:
        """See Store."""
        folder, _, _ = prefix.rpartition("/")
        start, place = (f"{folder}/", self.path(folder)) if folder else ("", self.root)
        keys = (start + name for name in self._names(place) if not _is_hidden(name))
        return sorted(key for key in keys if key.startswith(prefix))

    def entries(self, prefix: str = "") -> list[Entry]:
        """See Store."""
        found, root = [], f"{self.root}/"
        for key in self.list(prefix):
            try:
                stat = os.lstat(root + key)
            except FileNotFoundError:
                continue  # removed since
            except OSError as error:
                raise _explain("look at", Path(root + key), error) from error
            # Every publication is a new file, so the time's grain cannot hide a rewrite.
            found.append(Entry(key, stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}"))
        return found

    def move(self, key: str, new_key: str) -> bool:
        """See Store."""
        source, target = self.path(key), self.path(new_key)
        with _explained("move", source):
            _make_directory(target.parent)
            # Link, then unlink, because rename() would replace the target. A crash in between
            # leaves the object under both keys, and moving it again is harmless.
            if not _link(source, target):
                return False
            source.unlink()
            _fsync_directory(target.parent)
            _fsync_directory(source.parent)
        return True

    def delete(self, key: str) -> None:
        """See Store. Not flushed to disk: what a power cut brings back can be removed again."""
        path = self.path(key)
        with _explained("remove", path):
            path.unlink(missing_ok=True)
            if path.parent != self.root:
                with contextlib.suppress(OSError):  # not empty, or somebody else was faster
                    path.parent.rmdir()

    def local_folder(self, prefix: str) -> Path:
        """See Store."""
        return self.path(prefix)

    def probe(self) -> None:
        """See Store."""
        key = f"{PROBE}/{secrets.token_hex(8)}"
        first, second = self.put_new(key, b"first"), self.put_new(key, b"second")
        found = self.get(key)
        self.delete(key)
        if (first, second, found) != (True, False, b"first"):
            raise StoreError(
                f"the file system of {self.root} does not keep a file from being created twice "
                "(hard links are not exclusive there), so two workers could overwrite each "
                "other's results. Put the run folder on a local disk, NFS or Lustre."
            )

    def clean_temporaries(self, older_than_seconds: float) -> int:
        """See Store."""
        limit, removed = time.time() - older_than_seconds, 0
        for name in self._names(self.root):
            path = self.root / name
            if path.name.startswith(_TEMPORARY) or name.startswith(f"{PROBE}/"):
                with _explained("remove", path), contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime <= limit:
                        path.unlink()
                        removed += 1
        return removed

    def _names(self, folder: Path) -> Iterator[str]:
        """All files below a folder as '/'-separated names relative to it, in no order."""
        pending = [""]
        while pending:
            relative = pending.pop()
            directory = folder / relative
            try:
                entries = os.scandir(directory)
            except (FileNotFoundError, NotADirectoryError):
                if directory == self.root and directory.exists():
                    raise StoreError(
                        _sentence("list", directory, "it is not a directory")
                    ) from None
                continue
            except OSError as error:
                raise _explain("list", directory, error) from error
            with entries, _explained("list", directory):
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{relative}{entry.name}/")
                    else:
                        yield relative + entry.name


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


@contextlib.contextmanager
def _written_aside(final: Path, data: bytes) -> Iterator[Path]:
    """Write data durably under a hidden name beside ``final``; the name is gone afterwards."""
    temporary = final.with_name(f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    try:
        with _created(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _created(path: Path) -> BinaryIO:
    """A new file, and its directory; another process may remove that while it is empty."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            _make_directory(path.parent)
            return path.open("xb")
    _make_directory(path.parent)
    return path.open("xb")


def _link(source: Path, target: Path) -> bool:
    """Give ``source`` a second name unless it is taken; True if this call did it."""
    links_before = source.stat().st_nlink
    try:
        os.link(source, target)
    except OSError as error:
        # A network file system may carry out the link, lose the reply, repeat the request and then
        # report EEXIST (or EIO). The link count tells: nobody else links our file.
        if isinstance(error, FileNotFoundError) or _link_count(source) <= links_before:
            if isinstance(error, FileExistsError):
                return False
            raise
    return True


def _link_count(path: Path) -> int:
    """Link count as the server knows it: opening a file refreshes cached attributes."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_nlink


def _make_directory(directory: Path) -> None:
    """Create a directory and its parents durably."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    with contextlib.suppress(FileExistsError):  # another worker was faster
        directory.mkdir()
    _fsync_directory(directory.parent)


def _fsync_directory(directory: Path) -> None:
    """Make new and removed names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what failed, where, and what to do."""
    try:
        yield
    except OSError as error:
        raise _explain(action, path, error) from error


def _explain(action: str, path: Path, error: OSError) -> StoreError:
    """The StoreError for an OSError."""
    message = _sentence(action, path, _REASONS.get(error.errno or 0, f"{error}. Check the disk"))
    if isinstance(error, FileNotFoundError) and action in ("read", "move"):
        return MissingKeyError(message)
    return StoreError(message, disk_full=error.errno in _DISK_FULL)


def _sentence(action: str, path: Path, reason: str) -> str:
    return f"cannot {action} {path}: {reason}. Then run the same command again."


_LINK = (
    "it is a symbolic link, and below a run folder none is followed. Put what it leads to in its "
    "place; the run folder itself may be a link"
)
_REASONS = {
    errno.ENOSPC: "the disk is full. Free some space or move the run folder to a larger disk",
    errno.EDQUOT: "your disk quota is used up. Free some space or ask for more",
    errno.EROFS: "the file system is read-only. Choose a run folder that can be written",
    errno.EACCES: "permission denied. Choose a run folder you own, or change its permissions",
    errno.EPERM: "operation not permitted (no hard links there?). Choose another file system",
    errno.EOPNOTSUPP: "the file system has no hard links. Choose another file system",
    errno.ENOENT: "no such file or directory. Check the name",
    errno.ENOTDIR: "a part of the path is a file, not a directory. Choose another run folder",
    errno.EEXIST: "a part of the path is a file, not a directory. Choose another run folder",
    errno.EIO: "the disk reported an input/output error. Check the disk or the mount",
    errno.ESTALE: "the network file system lost the file. Check the mount",
}
