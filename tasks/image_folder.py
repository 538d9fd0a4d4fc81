"""Folders of images: a folder per class, or any layout with a CSV that lists files and labels.

An image is decoded when it is asked for. The content of every file is in the data set's identity,
and is checked again when the file is read.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from tasks.file_digests import content_digests, forget
from tasks.idx import DatasetError

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
SPLIT_NAMES = frozenset(("train", "training", "test", "testing", "val", "valid", "validation"))
MAX_PROBLEMS = 20  # of a CSV that are shown


@dataclass(frozen=True)
class FolderImages:
    """Image files below a folder.

    Attributes:
        root: The folder.
        names: Paths in it, with slashes.
    """

    root: Path
    names: tuple[str, ...]

    def read(self, i: int) -> tuple[bytes, str]:
        """Content of file ``i`` and its path.

        Raises:
            DatasetError: If it is gone, or not what it was when the identity was taken.
        """
        path = self.root / self.names[i]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _unreadable(error) from error
        found = hashlib.sha256(content).hexdigest()
        if found != self.digests[i]:
            forget(self.root)
            raise DatasetError(
                f"{path}: expected the content with sha256 {self.digests[i][:12]}, found "
                f"{found[:12]}: the image changed after the plan was made. Restore it, or run the "
                "command again."
            )
        return content, str(path)

    def fingerprint(self) -> bytes:
        """Names and contents of all files. Raises DatasetError if one cannot be read."""
        pairs = zip(self.names, self.digests, strict=True)
        try:
            return "".join(f"{name}\0{digest}\0" for name, digest in pairs).encode()
        except UnicodeEncodeError as error:
            raise DatasetError(
                f"{self.root}: expected file names in UTF-8, found {error.object[error.start]!r}. "
                "Rename the file."
            ) from error

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 of each file."""
        try:
            return content_digests(self.root, self.names)
        except OSError as error:
            raise _unreadable(error) from error


Listed = tuple[FolderImages, np.ndarray, tuple[str, ...]]  # images, labels, class names


def class_folders(root: Path, split: str) -> Listed:
    """List ``root/<split>/<class>/**/*``, or ``root/<class>/**/*`` where there are no splits.

    Classes are the folders in the order of their names.

    Raises:
        DatasetError: If there are no class folders, one is empty or holds something else, or
            images lie beside them.
    """
    others = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name in SPLIT_NAMES)
    folder = root / split if (root / split).is_dir() else root
    if folder == root and others:
        raise DatasetError(f"{root} has no split {split!r}, found: {', '.join(others)}")
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    class_names = tuple(sorted(entry.name for entry in visible if entry.is_dir()))
    loose = sorted(e.name for e in visible if e.is_file() and _is_image(e.name))
    if not class_names:
        raise DatasetError(
            f"{folder}: no class folders. Put the images of each class into a folder of its own, "
            'or list files and labels in a CSV: csv = "labels.csv".'
        )
    if loose:
        raise DatasetError(
            f"{folder}: {len(loose)} images lie beside the class folders, such as {loose[0]}, and "
            "belong to no class. Move them into class folders or away."
        )
    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        files = sorted(_files(folder / class_name, class_name), key=lambda name: name.split("/"))
        if not files:
            raise DatasetError(f"{folder / class_name}: empty. Remove the folder or fill it.")
        for name in files:
            if not _is_image(name):
                raise DatasetError(
                    f"{folder / name}: not an image by its name (expected one of "
                    f"{', '.join(sorted(IMAGE_SUFFIXES))}). Move it out of the class folder."
                )
        names += files
        labels += [label] * len(files)
    return FolderImages(folder, tuple(names)), np.array(labels, np.int64), class_names


def listed_images(root: Path, path: Path, *, with_labels: bool) -> Listed:
    """Read a CSV with the columns ``file`` (path below ``root``) and ``label``.

    Labels are class names: words, WordNet ids or integers. Classes are those that occur, integers
    in the order of their values and names in alphabetical order. Other columns are not read.

    Args:
        root: The folder of the images.
        path: The CSV, UTF-8, with a header.
        with_labels: Whether labels are wanted; without, they are -1 of no classes.

    Raises:
        DatasetError: With all problems, each with its line.
    """
    rows: list[tuple[str, str]] = []
    problems: list[str] = []
    lines: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            wanted = ("file", "label") if with_labels else ("file",)
            missing = [name for name in wanted if name not in (reader.fieldnames or ())]
            if missing:
                raise DatasetError(
                    f"{path}:1: expected a header with the columns file and label, found "
                    f"{', '.join(reader.fieldnames or ()) or 'nothing'}. Name the columns so."
                )
            for row in reader:
                name, label = (row.get("file") or "").strip(), (row.get("label") or "").strip()
                problem = _row_problem(root, name, lines)
                if None in row:  # DictReader's key for what is left over
                    problem = "more cells than the header has columns; quote a label with a comma"
                if problem is None and with_labels and not label:
                    problem = "label is empty"
                if problem is not None:
                    problems.append(f"{path}:{reader.line_num}: {problem}")
                    continue
                lines[name] = reader.line_num
                rows.append((name, label))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: expected a CSV in UTF-8, but {error}.") from error
    if problems:
        more = len(problems) - MAX_PROBLEMS
        listed = problems[:MAX_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise DatasetError("\n".join(listed))
    if not rows:
        raise DatasetError(f"{path}: lists no images. Add lines: file,label")
    images = FolderImages(root, tuple(name for name, _ in rows))
    if not with_labels:
        return images, np.full(len(rows), -1, np.int64), ()
    class_names = _ordered({label for _, label in rows})
    places = {name: i for i, name in enumerate(class_names)}
    return images, np.array([places[label] for _, label in rows], np.int64), class_names


def _row_problem(root: Path, name: str, lines: dict[str, int]) -> str | None:
    pure = PurePosixPath(name)
    if not name:
        return "file is empty"
    if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name:
        return f"file must be a plain path below {root}, found {name!r}"
    if name in lines:
        return f"{name} is listed in line {lines[name]} already: an image has one label"
    if not _is_image(name):
        return f"{name} is no image by its name"
    if not os.path.isfile(os.path.join(root, name)):
        return f"{name} is not in {root}"
    return None


def _ordered(labels: set[str]) -> tuple[str, ...]:
    if all(label.isascii() and label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _files(folder: Path, prefix: str) -> Iterator[str]:
    """Visible files below a folder, without Path objects: there may be a million."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _files(folder / entry.name, name)
            elif entry.name.startswith("."):
                continue
            elif entry.is_file():
                yield name
            else:
                raise DatasetError(
                    f"{entry.path}: expected a file or a folder, found a link to a folder or to "
                    "nothing. Replace it by what it stands for, or remove it."
                )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _unreadable(error: OSError) -> DatasetError:
    return DatasetError(
        f"{error.filename}: expected a readable image file, but {error.strerror}. Restore it, or "
        "give the right to read it."
    )
