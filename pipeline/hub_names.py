"""What a manifest's names stand for on the hub: from its lock, else from the hub, many at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import hub
from pipeline.entries import DataSpec, Manifest, TimmEntry
from pipeline.errors import DataError, HubError
from pipeline.hub_file import HubFile
from pipeline.lock import Lock, data_key, timm_key
from pipeline.patience import Circuit
from tasks.checkpoints import CheckpointError, describe_timm
from tasks.images import TRAINING_SPLIT


@dataclass(frozen=True)
class Weights:
    """A timm name of a manifest: its full name where timm knows it, its lock key, its file."""

    name: str
    entry: TimmEntry
    key: str
    file: HubFile | HubError


@dataclass(frozen=True)
class Images:
    """A split of a data set on the hub: its name, its lock key, its files."""

    name: str
    key: str
    files: tuple[HubFile, ...] | HubError | DataError


def find_weights(manifest: Manifest, lock: Lock, circuit: Circuit | None = None) -> list[Weights]:
    """The weights file of every timm name, in the manifest's order; locked ones ask nobody."""
    named = [(entry, *_full_name(name, entry)) for entry in manifest.timm for name in entry.names]
    asked = [
        (key, name, entry.revision or lock.commits.get(name))
        for entry, name, key, error in named
        if error is None and key not in lock.files
    ]
    answers = hub.resolve_all([(name, rev) for _, name, rev in asked], circuit or Circuit())
    found = {key: answer for (key, _, _), answer in zip(asked, answers, strict=True)}
    known = {key: files[0] for key, files in lock.files.items()}
    return [
        Weights(name, entry, key, error or known.get(key) or found[key])
        for entry, name, key, error in named
    ]


def find_images(manifest: Manifest, lock: Lock) -> Iterator[Images]:
    """The files of every split of data sets on the hub that the manifest needs."""
    from pipeline.hub_data import files

    wanted: dict[str, tuple[DataSpec, str]] = {}
    for data, split in _splits(manifest):
        if data.repo is not None:
            wanted.setdefault(data_key(data.repo, split, data.revision), (data, split))
    for key, (data, split) in wanted.items():
        name = f"{data.repo} {split}"
        try:
            locked = lock.files.get(key, ())
            yield Images(name, key, files(data, split=split, locked=locked))
        except (HubError, DataError) as error:
            yield Images(name, key, error)


def _full_name(name: str, entry: TimmEntry) -> tuple[str, str, HubError | None]:
    try:
        full = describe_timm(name, identity="").name
    except CheckpointError as error:
        return name, timm_key(name, entry.revision), HubError(str(error))
    return full, timm_key(full, entry.revision), None


def _splits(manifest: Manifest) -> Iterator[tuple[DataSpec, str]]:
    if manifest.measurements:
        yield manifest.data, manifest.data.split
        if any(entry.measurement.needs_training_images for entry in manifest.measurements):
            yield manifest.data, TRAINING_SPLIT
    for entry in manifest.train:
        yield from ((entry.data, TRAINING_SPLIT), (entry.data, "test"))
