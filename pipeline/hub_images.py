"""Images of a data set on the hub: described from the ends of its files, read from the files.

A plan needs the number of images and the names of their classes. Both are in the footers of the
Parquet files, so it downloads nothing else.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from pipeline.download import download
from pipeline.entries import DataSpec
from pipeline.hub_cache import cached
from pipeline.hub_file import HubFile
from pipeline.parquet_images import ParquetImages, check_columns, read_labels
from pipeline.patience import patiently
from tasks.file_digests import content_digests
from tasks.idx import DatasetError
from tasks.images import ImageDataset

FOOTER_BYTES = 2**18  # that of an ImageNet file fits: chosen
THREADS = 8  # footers asked for at once: chosen


@dataclass(frozen=True)
class HubImages:
    """What a plan must know of a split: nothing of it need be downloaded.

    Attributes:
        files: Its Parquet files.
        class_names: What the labels mean; empty if they are not read.
        num_images: Rows of all files.
        columns: Of images and labels.
    """

    files: tuple[HubFile, ...]
    class_names: tuple[str, ...]
    num_images: int
    columns: tuple[str, str]

    def __len__(self) -> int:
        return self.num_images

    def identity(self) -> str:
        """SHA-256 of the files' identities, each of which holds the SHA-256 of its bytes."""
        parts = ([file.content for file in self.files], self.columns)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def describe(data: DataSpec, found: tuple[HubFile, ...]) -> HubImages:
    """Describe the images in these files from their footers, which are fetched where need be.

    Raises:
        DatasetError: If a file has no such columns, or the files have other classes.
        HubError: If the hub cannot be asked.
    """
    label = data.label if data.labels == "use" else None
    with ThreadPoolExecutor(THREADS) as pool:
        footers = list(pool.map(_footer, found))
    classes = {
        file.filename: check_columns(footer, image=data.image, label=label, where=file.what)
        for file, footer in zip(found, footers, strict=True)
    }
    class_names = max(classes.values(), key=len)
    for name, others in classes.items():
        if others != class_names[: len(others)]:
            raise DatasetError(
                f"{name} has the classes {others[:4]}, another file of the split "
                f"{class_names[:4]}. The data set is damaged; choose another revision."
            )
    count = sum(footer.num_rows for footer in footers)
    return HubImages(found, class_names, count, (data.image, data.label))


def open_images(data: DataSpec, found: tuple[HubFile, ...]) -> ImageDataset:
    """The images in these files, which are downloaded unless the cache has them.

    Raises:
        DatasetError: If a file has no such columns, or a label is missing.
        HubError: If a file cannot be had.
        StoreError: If one does not fit on the disk.
    """
    paths = tuple(_fetched(file) for file in found)
    described = describe(data, found)
    if data.labels == "use":
        labels = read_labels(paths, data.label)
    else:
        labels = np.full(len(described), -1, np.int64)
    return ImageDataset(
        "hub", None, ParquetImages(paths, data.image), labels, described.class_names,
        given_identity=described.identity(),
    )  # fmt: skip


def _fetched(file: HubFile) -> Path:
    """The file in the cache, with the right bytes; hashed once, not by every worker."""
    path = cached(file)
    if path is not None and file.sha256 is not None:
        try:
            if content_digests(path.parent, [path.name]) == [file.sha256]:
                return path
        except OSError:
            pass  # unreadable: the download says why, or mends it
    return download(file)


def _footer(file: HubFile) -> pq.FileMetaData:
    """Schema, metadata and row groups of a file, from its last bytes."""
    path = cached(file)
    try:
        if path is not None:
            return pq.read_metadata(path)
        if constants.HF_HUB_OFFLINE or not file.size:
            return pq.read_metadata(download(file))
        tail = _tail(file, FOOTER_BYTES)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > len(tail):
            tail = _tail(file, length)
        return pq.read_metadata(pa.BufferReader(tail))
    except (OSError, pa.ArrowException) as error:  # damaged metadata is an OSError to Arrow
        reason = str(error).strip()
        raise DatasetError(f"{file.what}: expected a Parquet file, but {reason}.") from error


def _tail(file: HubFile, length: int) -> bytes:
    """The last bytes of a file, by a range request."""
    assert file.size is not None
    url = hf_hub_url(file.repo_id, file.filename, repo_type="dataset", revision=file.commit)
    headers = build_hf_headers() | {"Range": f"bytes={max(0, file.size - length)}-"}

    def fetch() -> bytes:
        response = get_session().get(
            url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        )
        hf_raise_for_status(response)
        return response.content[-length:]

    return patiently(fetch, what=f"the end of {file.what}")
