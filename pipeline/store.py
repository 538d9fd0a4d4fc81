"""The run folder: a small object store with create-if-absent.

Keys are '/'-separated names below one root. ``put_new`` publishes a complete object or nothing and
never replaces one, so that an object's existence is the whole proof that its work is done; ``put``
replaces atomically, for tables that can be derived again. There are no locks and no index.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from pipeline.errors import StoreError

PROBE = "probe"  # folder of the start-up check's objects
_MAX_SEGMENT_BYTES = 255  # NAME_MAX of the common file systems


class MissingKeyError(StoreError):
    """No object under this key, or not any more."""


class Entry(NamedTuple):
    """One object of a listing; ``stamp`` is another one whenever the object was rewritten."""

    key: str
    size: int
    stamp: str


class Store(Protocol):
    """Objects under '/'-separated keys. All methods raise StoreError where the store fails."""

    @property
    def uri(self) -> str:
        """What ``open_store`` takes to open this store in another process."""
        ...

    def put_new(self, key: str, data: bytes) -> bool:
        """Publish durably unless the key exists. Returns whether this call created it."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Publish durably, replacing what was there in one step."""
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises MissingKeyError if there is none."""
        ...

    def exists(self, key: str) -> bool:
        """Whether an object is there."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """All keys that begin with ``prefix``, sorted; never temporaries."""
        ...

    def entries(self, prefix: str = "") -> list[Entry]:
        """The same objects with sizes in bytes and stamps, sorted by key."""
        ...

    def move(self, key: str, new_key: str) -> bool:
        """Rename unless ``new_key`` is taken: then False. Raises MissingKeyError."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object. No error if there is none."""
        ...

    def local_folder(self, prefix: str) -> Path:
        """A directory on this machine with the objects below ``prefix``, to be read only."""
        ...

    def probe(self) -> None:
        """Start-up check: writable, and a second ``put_new`` of one key is refused."""
        ...

    def clean_temporaries(self, older_than_seconds: float) -> int:
        """Remove what killed writers and probes left. Returns the number of files removed."""
        ...


def open_store(uri: str | Path) -> Store:
    """Open the run folder at a path, ``file://`` or ``s3://`` URI. Nothing is created or checked.

    Raises:
        StoreError: The URI names something else, or no bucket.
    """
    from pipeline.local_store import LocalStore

    if isinstance(uri, Path):
        return LocalStore(uri.absolute())
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri).absolute())
    if scheme.lower() == "s3":
        from pipeline.object_store import ObjectStore

        return ObjectStore(uri)
    parts = urlsplit(uri)
    if scheme.lower() == "file" and parts.netloc in ("", "localhost") and parts.path:
        return LocalStore(Path(unquote(parts.path)).absolute())
    raise StoreError(
        f"cannot open the run folder {uri!r}: expected a local or mounted directory, "
        "such as runs/vits or file:///data/runs/vits, or s3://bucket/prefix"
    )


def validated(key: str) -> str:
    """Return the key if it can only name a visible file below the root."""
    for segment in key.split("/"):
        if (
            not segment
            or segment.startswith(".")
            or "\\" in segment
            or not segment.isprintable()
            or len(segment.encode()) > _MAX_SEGMENT_BYTES
        ):
            raise StoreError(
                f"{key!r} cannot be a key of the run folder: expected names joined by '/', each "
                "printable, not empty, without '\\' and without a leading '.'"
            )
    return key
