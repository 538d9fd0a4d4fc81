"""Which files a name stands for, kept beside a manifest and in a run folder.

The one is ``<manifest>.lock.json``, the other ``hub.lock.json``; their format is the same. A
repository on the hub can change under its name. What is locked is taken from the lock, and the hub
is not asked. The manifest's lock goes before the run's, so that ``flatcensus lock --update``
reaches runs that exist; a ``revision`` in the manifest is part of the key that is looked up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pydantic

from pipeline.errors import StoreError
from pipeline.hub_file import SHA256, HubFile, url_file
from pipeline.store import Store

LOCK = "hub.lock.json"
LOCK_VERSION = 1


@dataclass(frozen=True)
class Lock:
    """Files by key: ``timm:<full name>``, ``data:<repository>/<split>``, each with ``@<revision>``.

    Attributes:
        files: Files of each key, in order.
        commits: Commits by timm name: all that run folders of earlier versions kept.
    """

    files: Mapping[str, tuple[HubFile, ...]] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Lock) -> Lock:
        """Both; where both know a key, the other goes first."""
        return Lock({**self.files, **other.files}, {**self.commits, **other.commits})

    def encode(self) -> bytes:
        """The lock as the text of a file."""
        records = {key: [asdict(file) for file in files] for key, files in self.files.items()}
        known = {"lock_version": LOCK_VERSION, "files": records}
        if self.commits:
            known["commits"] = dict(self.commits)
        return (json.dumps(known, indent=1, sort_keys=True) + "\n").encode()


def timm_key(name: str, revision: str | None) -> str:
    """Lock key of a timm name, under its full name with tag."""
    return f"timm:{name}" + (f"@{revision}" if revision else "")


def data_key(repo: str, split: str, revision: str | None) -> str:
    """Lock key of a split of a data set."""
    return f"data:{repo}/{split}" + (f"@{revision}" if revision else "")


def lock_path(manifest: Path) -> Path:
    """The lock that belongs to a manifest: ``census.toml`` has ``census.lock.json``."""
    return manifest.with_suffix(".lock.json")


def read_lock(path: Path) -> Lock:
    """A manifest's lock; empty if there is none. Raises StoreError if it is damaged."""
    try:
        return _decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        return Lock()
    except OSError as error:
        raise StoreError(f"{path}: cannot read the lock ({error}). Correct its permissions") from (
            error
        )


def write_lock(path: Path, lock: Lock) -> None:
    """Write a manifest's lock, whole or not at all. Raises StoreError."""
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_bytes(lock.encode())
        aside.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot write the lock ({error})") from error


def run_lock(store: Store) -> Lock:
    """What a run first saw; empty if it saw nothing yet. Raises StoreError if it is damaged."""
    return _decode(store.get(LOCK), f"{store.uri}/{LOCK}") if store.exists(LOCK) else Lock()


def known_lock(beside: Path | None, store: Store) -> Lock:
    """The run's lock and, before it, the one beside the manifest. Raises StoreError."""
    return run_lock(store) | (read_lock(beside) if beside else Lock())


def keep(files: Mapping[str, tuple[HubFile, ...]], store: Store) -> None:
    """Remember in the run folder what its manifest's names stand for now."""
    known = run_lock(store)
    commits = {n: c for n, c in known.commits.items() if timm_key(n, None) not in files}
    merged = Lock({**known.files, **files}, commits)
    if files and merged != known:
        store.put(LOCK, merged.encode())


def _decode(content: bytes, where: str) -> Lock:
    try:
        found = json.loads(content)
        if "lock_version" not in found:  # run folders of earlier versions: names and commits
            return Lock(commits=_STRINGS.validate_python(found))
        if found["lock_version"] != LOCK_VERSION:
            raise ValueError(f"lock version {found['lock_version']!r}, this one is {LOCK_VERSION}")
        known = _FILES.validate_python(found["files"])
        for file in (file for files in known.values() for file in files):
            if not _has_place(file):
                raise ValueError(f"no file of the cache: {file.filename!r} at {file.commit!r}")
        return Lock(known, _STRINGS.validate_python(found.get("commits", {})))
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"{where} is damaged ({type(error).__name__}: {reason}). Expected what flatcensus "
            "wrote; restore it, or delete it to take the hub's current files"
        ) from error


def _has_place(file: HubFile) -> bool:
    """Whether commit and name are a place in the cache: locks are passed on, and may be forged."""
    if file.repo_type == "url":
        named = url_file(file.url)
        return named is not None and (named.commit, named.filename) == (file.commit, file.filename)
    if file.sha256 is not None and SHA256.fullmatch(file.sha256) is None:
        return False  # names of partial downloads begin with it
    parts = {*file.filename.split("/"), *file.repo_id.split("/")}
    return "/" not in file.commit and not {"", ".", ".."} & {file.commit, *parts}


_STRINGS: pydantic.TypeAdapter[dict[str, str]] = pydantic.TypeAdapter(
    dict[str, str], config=pydantic.ConfigDict(strict=True)
)
_FILES: pydantic.TypeAdapter[dict[str, tuple[HubFile, ...]]] = pydantic.TypeAdapter(
    dict[str, tuple[HubFile, ...]]
)
