"""The images of a manifest: opened or described for a plan, opened for a worker, labels mapped.

Data sets on the hub are described from their files' footers while planning, and downloaded by the
workers that measure them: from the files that the plan has pinned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.entries import DataSpec, Manifest
from pipeline.errors import DataError, HubError, ManifestError
from pipeline.hub_file import UNLOCKED, HubFile
from pipeline.lock import Lock, data_key
from tasks.checkpoints import CheckpointRef
from tasks.class_labels import LabelError, label_map, network_classes
from tasks.datasets import TRAINING_SPLIT, DatasetError, ImageDataset, load_dataset

if TYPE_CHECKING:
    from pipeline.hub_images import HubImages


def open_dataset(
    data: DataSpec, *, split: str | None = None, files: Sequence[HubFile] = ()
) -> ImageDataset:
    """The images of a data table, or of another split of them.

    Args:
        data: The table.
        split: Another split than the table's.
        files: For data sets on the hub, the pinned files of the split.

    Raises:
        DatasetError: If they cannot be had or read.
        HubError: If a file cannot be had from the hub.
    """
    if data.name == "hub":
        from pipeline.hub_images import open_images

        return open_images(data, tuple(files))
    return load_dataset(
        data.name,
        split=split or data.split,
        root=Path(data.root) if data.root is not None else None,
        csv=Path(data.csv) if data.csv is not None else None,
        with_labels=data.labels == "use",
    )


@dataclass(frozen=True)
class UnknownImages:
    """Images that a plan takes on trust: the hub did not answer, or does not give them.

    Attributes:
        name: An identity that nothing can be stored under: why they are unknown.
        num_images: As many as are measured.
        class_names: None are known.
        is_silent: Whether the hub did not answer at all.
    """

    name: str
    num_images: int
    class_names: tuple[str, ...] = ()
    is_silent: bool = True

    def __len__(self) -> int:
        return self.num_images

    def identity(self) -> str:
        """The name."""
        return self.name


Images: TypeAlias = "ImageDataset | HubImages | UnknownImages"


class PlannedImages:
    """Loads each split once per resolution. ``files`` are those of the hub, by lock key.

    ``tentative`` is for plans alone: images that the hub does not give are unknown.
    """

    def __init__(self, lock: Lock, *, tentative: bool = False) -> None:
        self.lock, self.tentative = lock, tentative
        self.files: dict[str, tuple[HubFile, ...]] = {}
        self.known: dict[str, Images] = {}

    def get(self, data: DataSpec, split: str | None = None) -> Images:
        """One split of a data table: enough of it to know its identity, number and classes.

        Raises:
            DataError: If it cannot be had or read.
            HubError: If the hub does not tell of it.
        """
        split = split or data.split
        key = f"{data.model_dump_json(exclude={'samples'})} {split}"
        if key not in self.known:
            try:
                self.known[key] = self._hub(data, split) if data.name == "hub" else (
                    open_dataset(data, split=split)
                )  # fmt: skip
                self.known[key].identity()  # of all bytes: a file may be missing or locked
            except HubError as error:
                if not self.tentative:
                    raise
                self.known[key] = UnknownImages(
                    f"{UNLOCKED}{error}", data.samples, is_silent=error.unasked
                )
            except (DatasetError, OSError) as error:
                raise DataError(f"[data] name = {data.name!r}: {error}") from error
        return self.known[key]

    def whole(self, data: DataSpec, split: str, purpose: str) -> ImageDataset:
        """One split for a training. Raises ManifestError for kinds that are only measured."""
        special = {
            f"name = {data.name!r}": data.name == "hub",
            "a csv": data.csv is not None,
            'labels = "ignore"': data.labels == "ignore",
        }
        found = None if any(special.values()) else self.get(data, split)
        if not isinstance(found, ImageDataset):
            raise ManifestError(
                f"{purpose}: networks are trained on whole splits with labels, found "
                f"{next(name for name, given in special.items() if given)}. Give the table data of "
                "its own: digits, fashion-mnist or class folders"
            )
        return found

    def pinned(self, data: DataSpec, split: str) -> tuple[HubFile, ...]:
        """The hub's files of a split that ``get`` has looked at; none for other data."""
        return self.files.get(_key(data, split), ()) if data.name == "hub" else ()

    def training(self, manifest: Manifest, images: Images) -> Images | None:
        """The training images beside those of the manifest, if one of its measurements takes them.

        Raises:
            DataError: There are none, or they have other classes.
            ManifestError: They are fewer than ``samples``.
        """
        metrics = [e.metric for e in manifest.measurements if e.measurement.needs_training_images]
        if not metrics:
            return None
        _check_place(manifest.data, metrics[0])
        training = self.get(manifest.data, TRAINING_SPLIT)
        _check_training(training, images, manifest.data, metrics[0])
        return training

    def _hub(self, data: DataSpec, split: str) -> HubImages:
        from pipeline import hub_data, hub_images

        key = _key(data, split)
        self.files[key] = hub_data.files(data, split=split, locked=self.lock.files.get(key, ()))
        return hub_images.describe(data, self.files[key])


def outputs_of_classes(
    manifest: Manifest,
    images: Images,
    ref: CheckpointRef,
    *,
    num_outputs: int,
) -> tuple[int, ...] | None:
    """The network's output for each class of the data; None where they are the same, or not read.

    Raises:
        LabelError: If the network has other classes, and a measurement needs labels.
    """
    if not reads_labels(manifest) or isinstance(images, UnknownImages):
        return None
    try:
        found = label_map(
            images.class_names,
            num_outputs=num_outputs,
            known=network_classes(ref, num_outputs=num_outputs),
            integers_are_indices=manifest.data.name != "digits",
        )
    except LabelError as error:
        raise LabelError(f"labels of {manifest.data.name!r}: {error}") from error
    return None if found == tuple(range(len(found))) else found


def reads_labels(manifest: Manifest) -> bool:
    """Whether anything that is measured needs labels. Else nobody asks what they mean."""
    needed = any(entry.measurement.needs_labels for entry in manifest.measurements)
    return needed and manifest.data.labels == "use"


def map_identity(outputs: Sequence[int]) -> str:
    """What a map of labels adds to a key."""
    return hashlib.sha256(json.dumps(list(outputs)).encode()).hexdigest()


def _key(data: DataSpec, split: str) -> str:
    return data_key(data.repo or "", split, data.revision)


def _check_place(data: DataSpec, metric: str) -> None:
    """Without folders of splits, every split would be the same images."""
    if data.name != "image-folder" or data.root is None:
        return
    if data.csv is not None:
        raise DataError(
            f"{metric} needs images of the training split besides those that are measured, but "
            "csv lists images of one split. Use class folders, or remove the measurement"
        )
    folder = Path(data.root) / TRAINING_SPLIT
    if not folder.is_dir():
        raise DataError(
            f"{metric} needs images of the training split besides those that are measured, "
            f"but there is no folder {folder}. Put them into {folder}/<class>/ and the others "
            f"into {folder.parent / data.split}/<class>/, or remove the measurement"
        )


def _check_training(
    training: Images,
    images: Images,
    data: DataSpec,
    metric: str,
) -> None:
    if training.class_names != images.class_names:
        raise DataError(
            f"{metric}: the training images of {data.name!r} have classes "
            f"{training.class_names[:12]}, those of split {data.split!r} "
            f"{images.class_names[:12]}. Labels are the places of the class folders in "
            "alphabetical order, so both splits need the same ones"
        )
    if data.samples > len(training):
        raise ManifestError(
            f"[data] samples = {data.samples}, but {metric} needs as many training images and "
            f"{data.name} {TRAINING_SPLIT} has {len(training)}. Lower samples or add images"
        )
