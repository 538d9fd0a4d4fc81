"""Image data sets and where they lie: ``digits``, ``fashion-mnist`` and image folders.

``digits`` (1,797 images of 8×8) ships with scikit-learn, ``fashion-mnist`` (70,000 of 28×28) is
four IDX files, an image folder has one subfolder per class. Nothing is downloaded, and an image
of a folder is decoded only when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tasks.idx import DatasetError, read_idx

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
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
SPLIT_NAMES = frozenset(("train", "training", "test", "testing", "val", "valid", "validation"))


@dataclass(frozen=True)
class ImageDataset:
    """One split of a data set.

    Attributes:
        name: The name it was loaded by.
        root: What the paths of ``images`` are relative to; None for images in memory.
        images: Either (N, H, W) uint8 grey values or the N files.
        labels: (N,) integers, indices into ``class_names``.
        class_names: What the labels mean.
    """

    name: str
    root: Path | None
    images: np.ndarray | tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

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
        """Image ``i`` in mode L or RGB. Transparency is dropped, palettes are resolved."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[i])
        return _read_image(self.images[i])

    def identity(self) -> str:
        """SHA-256 of all images and labels of this split, computed once per object."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        digest = hashlib.sha256(repr((self.class_names, len(self))).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        if isinstance(self.images, np.ndarray):
            digest.update(repr(self.images.shape).encode())
            digest.update(self.images.tobytes())
        else:
            assert self.root is not None
            for path in self.images:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(self.root).as_posix()}\0{content}\0".encode())
        return digest.hexdigest()


def load_dataset(name: str, *, split: str, root: Path | None = None) -> ImageDataset:
    """Load one split of a data set.

    Args:
        name: One of ``DATASETS``.
        split: ``"train"`` or ``"test"``; for image folders the name of a subfolder of ``root``.
        root: Where the data lie. Not used by ``digits``; ``fashion-mnist`` otherwise looks at
            $FLATCENSUS_FASHION_MNIST and the usual places.

    Raises:
        DatasetError: If the data are missing, damaged or not of the expected form.
    """
    if name == "image-folder":
        return _image_folder(root, split)
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


def _image_folder(root: Path | None, split: str) -> ImageDataset:
    if root is None or not Path(root).is_dir():
        raise DatasetError(f"image-folder needs root = the folder of the images, found {root!r}")
    root = Path(root)
    others = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name in SPLIT_NAMES)
    folder = root / split if (root / split).is_dir() else root
    if folder == root and others:
        raise DatasetError(f"{root} has no split {split!r}, found: {', '.join(others)}")
    class_names = tuple(sorted(p.name for p in folder.iterdir() if _visible_folder(p)))
    if not class_names:
        raise DatasetError(
            f"{folder}: no class folders. Put the images of each class into a folder of its own."
        )
    images: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        files = sorted(p for p in (folder / class_name).rglob("[!.]*") if p.is_file())
        if not files:
            raise DatasetError(f"{folder / class_name}: empty. Remove the folder or fill it.")
        for path in files:
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise DatasetError(
                    f"{path}: not an image by its name (expected one of "
                    f"{', '.join(sorted(IMAGE_SUFFIXES))}). Move it out of the class folder."
                )
        images += files
        labels += [label] * len(files)
    return ImageDataset(
        "image-folder", folder, tuple(images), np.array(labels, np.int64), class_names
    )


def _visible_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DatasetError(
            f"{path}: expected a readable image, found {path.stat().st_size} bytes that do not "
            f"decode ({error}). Replace or remove the file."
        ) from error
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise DatasetError(
            f"{path}: expected 8 bits per channel, found mode {image.mode!r}. Convert the file."
        )
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")
