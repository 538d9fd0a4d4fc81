"""Image data sets and where they lie: ``digits``, ``fashion-mnist`` and image folders.

``digits`` (1,797 images of 8×8) ships with scikit-learn, ``fashion-mnist`` (70,000 of 28×28) is
four IDX files, image folders are the subject of ``tasks.image_folder``. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tasks.decoding import decode
from tasks.idx import DatasetError, read_idx
from tasks.image_folder import class_folders, listed_images

DATASETS = ("digits", "fashion-mnist", "image-folder")
TRAINING_SPLIT = "train"
FASHION_MNIST_VARIABLE = "FLATCENSUS_FASHION_MNIST"
FETCHED_FASHION_MNIST = Path.home() / ".cache/flatcensus/fashion-mnist"
FASHION_MNIST_PLACES = (
    Path("/usr/share/datasets/fashion-mnist"),  # the Debian package
    Path("/usr/share/datasets/FashionMNIST/raw"),
    FETCHED_FASHION_MNIST,
)
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NUM_TEST_DIGITS = 500  # chosen: 1,297 remain for training


class EncodedImages(Protocol):
    """Images as their files hold them, read one by one."""

    def read(self, i: int) -> tuple[bytes, str]:
        """Content of image ``i`` and where it lies. Raises DatasetError if it cannot be had."""
        ...

    def fingerprint(self) -> bytes:
        """What tells them from others, for the identity of the data set."""
        ...


@dataclass(frozen=True)
class ImageDataset:
    """One split of a data set.

    Attributes:
        name: The name it was loaded by.
        root: The folder of its files; None for images in memory.
        images: Either (N, H, W) uint8 grey values or N encoded images.
        labels: (N,) integers, indices into ``class_names``; -1 where they are not read.
        class_names: What the labels mean.
        given_identity: Its identity where that is known without reading labels and images.
    """

    name: str
    root: Path | None
    images: np.ndarray | EncodedImages
    labels: np.ndarray
    class_names: tuple[str, ...]
    given_identity: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes of the data, which may be fewer than the network's outputs."""
        return len(self.class_names)

    def label(self, i: int) -> int:
        """Class index of image ``i``."""
        return int(self.labels[i])

    def image(self, i: int) -> Image.Image:
        """Image ``i`` in mode L or RGB. Raises DatasetError if it cannot be had or decoded."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[i])
        return decode(*self.images.read(i))

    def identity(self) -> str:
        """SHA-256 of all images and labels of this split, computed once per object."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        if self.given_identity is not None:
            return self.given_identity
        digest = hashlib.sha256(repr((self.class_names, len(self))).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        if isinstance(self.images, np.ndarray):
            digest.update(repr(self.images.shape).encode())
            digest.update(self.images.tobytes())
        else:
            digest.update(self.images.fingerprint())
        return digest.hexdigest()


def load_dataset(
    name: str,
    *,
    split: str,
    root: Path | None = None,
    csv: Path | None = None,
    with_labels: bool = True,
) -> ImageDataset:
    """Load one split of a data set.

    Args:
        name: One of ``DATASETS``.
        split: ``"train"`` or ``"test"``; for image folders the name of a subfolder of ``root``.
        root: Where the data lie. Not used by ``digits``; ``fashion-mnist`` otherwise looks at
            $FLATCENSUS_FASHION_MNIST and the usual places.
        csv: For image folders, a list of files and labels; see ``tasks.image_folder``.
        with_labels: Whether labels are wanted. Without, a CSV needs none.

    Raises:
        DatasetError: If the data are missing, damaged or not of the expected form.
    """
    if name == "image-folder":
        if root is None or not Path(root).is_dir():
            raise DatasetError(f"image-folder needs root = the folder of the images, found {root}")
        if csv is None:
            images, labels, class_names = class_folders(Path(root), split)
        else:
            images, labels, class_names = listed_images(Path(root), csv, with_labels=with_labels)
        return ImageDataset(name, images.root, images, labels, class_names)
    if name not in DATASETS:
        raise DatasetError(f"unknown data set {name!r}. Choose one of: {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise DatasetError(f"{name} has the splits 'train' and 'test', found split = {split!r}")
    return _digits(split) if name == "digits" else _fashion_mnist(root, split)


def _digits(split: str) -> ImageDataset:
    from sklearn.datasets import load_digits  # slow to import, and only this needs it

    data: Any = load_digits()
    # Published as integers 0..16 stored in float64; 255/16 is exact, rint rounds halves to even.
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    order = sorted(range(len(images)), key=lambda i: hashlib.blake2b(b"digits %d" % i).digest())
    chosen = sorted(order[:NUM_TEST_DIGITS] if split == "test" else order[NUM_TEST_DIGITS:])
    names = tuple(str(n) for n in range(10))
    return ImageDataset("digits", None, images[chosen], data.target[chosen].astype(np.int64), names)


def _fashion_mnist(root: Path | None, split: str) -> ImageDataset:
    variable = os.environ.get(FASHION_MNIST_VARIABLE)
    places = (Path(root),) if root else (Path(variable),) if variable else FASHION_MNIST_PLACES
    prefix = "train" if split == "train" else "t10k"
    images_path = _find(places, f"{prefix}-images-idx3-ubyte")
    labels_path = _find((images_path.parent,), f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise DatasetError(
            f"{images_path} holds {len(images)} images but {labels_path} {len(labels)} labels. "
            "Take both files from one source."
        )
    if not len(labels) or labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DatasetError(f"{labels_path}: expected labels 0 to 9, found {set(labels.tolist())}")
    return ImageDataset(
        "fashion-mnist", None, images, labels.astype(np.int64), FASHION_MNIST_CLASSES
    )


def _find(places: Sequence[Path], stem: str) -> Path:
    for place in places:
        for path in (place / f"{stem}.gz", place / stem):
            if path.is_file():
                return path
    raise DatasetError(
        f"no {stem} or {stem}.gz in {', '.join(map(str, places))}. Install the Debian package "
        f"dataset-fashion-mnist, set root or ${FASHION_MNIST_VARIABLE} to the folder that holds "
        "the four IDX files, or fetch them from the hub: python -c "
        "'from pipeline.hub import fetch_fashion_mnist as f; f()'"
    )
