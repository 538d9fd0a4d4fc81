"""The run folder in an S3 bucket.

An upload of one request becomes visible whole or not at all, and ``If-None-Match: *`` makes the
server refuse it where the key is taken: that is the whole commit protocol. Servers that overlook
the condition are found by ``probe`` and refused. Every object is uploaded by a single request (S3
allows 5 GB), never in parts, so killed writers leave nothing behind.

A reply can be lost after the server has done its work, and the repeated request is then refused by
our own success. Each publication therefore carries a random mark in the object's metadata, and
whoever is refused looks whose mark is there.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError

from pipeline.errors import StoreError
from pipeline.folder_copy import local_copy
from pipeline.s3_requests import Bucket, UnsettledError, repeated
from pipeline.store import PROBE, Entry, MissingKeyError, validated

if TYPE_CHECKING:
    from obstore import ObjectMeta

T = TypeVar("T")

MAX_BYTES = 5 * 10**9  # of one upload request: S3's limit
_PAGE = 1000  # S3's limit of one listing request
_WRITER, _SHA256 = "flatcensus-writer", "flatcensus-sha256"
_RACERS = 8


class ObjectStore:
    """A bucket, or what is below a prefix in it, as a Store."""

    def __init__(self, uri: str) -> None:
        """Raises StoreError if the URI is not ``s3://bucket/prefix``."""
        parts = urlsplit(uri)
        if parts.username is not None or parts.password is not None:
            raise StoreError(
                "credentials do not belong into a run folder's name, which is stored and shown. "
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )
        self.prefix = uri.partition("://")[2].partition("/")[2].strip("/")
        if not parts.netloc or not _is_plain(self.prefix):
            raise StoreError(
                f"cannot open the run folder {uri!r}: expected s3://bucket/prefix, such as "
                "s3://census/runs/vits"
            )
        self.bucket = Bucket(parts.netloc)
        self._start = len(self.prefix) + 1 if self.prefix else 0  # of keys in objects' names

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{self.bucket.name}/{self.prefix}".rstrip("/")

    def put_new(self, key: str, data: bytes) -> bool:
        """See Store."""
        name, mark = self._name(key), secrets.token_hex(16)
        attributes = {_WRITER: mark, **self._digest(key, data)}

        def create() -> bool:
            try:
                obstore.put(
                    self.bucket.writer(len(data)), name, data, mode="create",
                    attributes=attributes, use_multipart=False,
                )  # fmt: skip
            except AlreadyExistsError:  # 412, or 409 while another request is being decided
                try:
                    return self._attributes(name).get(_WRITER) == mark
                except FileNotFoundError:
                    raise UnsettledError("refused, although the key is free") from None
            return True

        return self._repeated("create", name, create)

    def put(self, key: str, data: bytes) -> None:
        """See Store."""
        name, attributes = self._name(key), self._digest(key, data)
        self._repeated(
            "write", name,
            lambda: obstore.put(
                self.bucket.writer(len(data)), name, data, attributes=attributes,
                use_multipart=False,
            ),
        )  # fmt: skip

    def get(self, key: str) -> bytes:
        """See Store."""
        return self._get(key)[0]

    def exists(self, key: str) -> bool:
        """See Store."""
        name = self._name(key)
        try:
            self._repeated("look at", name, lambda: obstore.head(self.bucket.reader(), name))
        except MissingKeyError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """See Store."""
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str = "") -> list[Entry]:
        """See Store."""
        folder, _, _ = prefix.rpartition("/")
        if folder:
            validated(folder)
        found = [
            Entry(m["path"][self._start :], m["size"], m["e_tag"] or str(m["last_modified"]))
            for page in self._pages(f"{self.prefix}/{folder}".strip("/"))
            for m in page
        ]
        return sorted(e for e in found if e.key.startswith(prefix) and _is_plain(e.key) and e.key)

    def move(self, key: str, new_key: str) -> bool:
        """See Store. A crash in between leaves the object under both keys."""
        self._name(new_key)
        if not self.put_new(new_key, self.get(key)):
            return False
        self.delete(key)
        return True

    def delete(self, key: str) -> None:
        """See Store."""
        name = self._name(key)
        try:
            self._repeated("remove", name, lambda: obstore.delete(self.bucket.reader(), name))
        except MissingKeyError:
            pass

    def local_folder(self, prefix: str) -> Path:
        """See Store. A copy in the user's cache, checked by digests on every call."""
        validated(prefix)
        entries = self.entries(f"{prefix}/")
        files = [(entry.key[len(prefix) + 1 :], entry.stamp) for entry in entries]
        return local_copy(
            f"{self.uri}/{prefix}", files, lambda name: self._sound(f"{prefix}/{name}")
        )

    def probe(self) -> None:
        """See Store. Writers one after the other, then several at once."""
        key = f"{PROBE}/{secrets.token_hex(8)}"
        first, second = self.put_new(key, b"first"), self.put_new(key, b"second")
        found = self.get(key)
        with ThreadPoolExecutor(_RACERS) as pool:
            raced = list(
                pool.map(lambda n: self.put_new(f"{key}-raced", b"%d" % n), range(_RACERS))
            )
        self.delete(key)
        self.delete(f"{key}-raced")
        if (first, second, found) != (True, False, b"first") or raced.count(True) != 1:
            raise StoreError(
                f"the store {self.uri} at {self.bucket.endpoint} lets an object be created twice "
                "(it does not honour If-None-Match), so two workers could overwrite each other's "
                "results. Use a store with conditional writes, such as AWS S3 or MinIO, or a "
                "directory."
            )

    def clean_temporaries(self, older_than_seconds: float) -> int:
        """See Store. Of killed probes alone: an upload that did not end was never an object."""
        limit = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        pages = self._pages(self._name(PROBE))
        old = [m["path"] for page in pages for m in page if m["last_modified"] <= limit]
        for name in old:
            self.delete(name[self._start :])
        return len(old)

    def _get(self, key: str) -> tuple[bytes, dict[str, str]]:
        """The object's bytes and attributes."""
        name = self._name(key)

        def read() -> tuple[bytes, dict[str, str]]:
            answer = obstore.get(self.bucket.reader(), name)
            data = bytes(answer.bytes())
            if len(data) != answer.meta["size"]:
                raise UnsettledError(f"{len(data)} of {answer.meta['size']} bytes arrived")
            return data, dict(answer.attributes)

        return self._repeated("read", name, read)

    def _sound(self, key: str) -> bytes:
        """The object's bytes, which must be those that were written."""
        for _ in range(2):  # damaged on the way, perhaps
            data, attributes = self._get(key)
            known = attributes.get(_SHA256)
            if known is None or known == hashlib.sha256(data).hexdigest():
                return data
        raise StoreError(
            f"{self.uri}/{key} is damaged: its SHA-256 is not that of what was written. Remove "
            f"{self.uri}/{key.rpartition('/')[0]} and the shards of the same name, then: "
            f"flatcensus resume {self.uri}"
        )

    def _attributes(self, name: str) -> dict[str, str]:
        return dict(obstore.get(self.bucket.reader(), name, options={"head": True}).attributes)

    def _pages(self, folder: str) -> Iterator[Sequence[ObjectMeta]]:
        """The listing below a folder; an error costs one page, not all that came before it."""
        stream: Iterator[Sequence[ObjectMeta]] | None = None
        last: str | None = None

        def following() -> Sequence[ObjectMeta] | None:
            nonlocal stream
            if stream is None:
                stream = obstore.list(
                    self.bucket.reader(), folder or None, offset=last, chunk_size=_PAGE
                )
            try:
                return next(stream, None)
            except BaseException:
                stream = None  # the next try opens another one behind what is known
                raise

        while page := self._repeated("list", folder, following):
            last = page[-1]["path"]
            yield page

    def _digest(self, key: str, data: bytes) -> dict[str, str]:
        if len(data) > MAX_BYTES:
            raise StoreError(
                f"{self.uri}/{key} would have {len(data)} bytes, but S3 takes {MAX_BYTES} in one "
                "upload. Use a directory as run folder for checkpoints of this size"
            )
        return {_SHA256: hashlib.sha256(data).hexdigest()}

    def _repeated(self, action: str, name: str, request: Callable[[], T]) -> T:
        return repeated(self.bucket, action, name, request)

    def _name(self, key: str) -> str:
        """The object's name in the bucket."""
        return f"{self.prefix}/{validated(key)}".lstrip("/")


def _is_plain(name: str) -> bool:
    """Whether a name can be that of an object of a run; others in the bucket are not ours."""
    try:
        return not name or validated(name) == name
    except StoreError:
        return False
