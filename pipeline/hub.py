"""Weights and data on the Hugging Face hub: found, and pinned to what they are now.

A timm name is resolved once to a commit, a file and its SHA-256; after that everything works with
the commit, so a cached file costs no request. Only safetensors files are taken. With
HF_HUB_OFFLINE=1 names are resolved from the cache.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
from huggingface_hub import constants
from PIL import Image

from pipeline.download import download
from pipeline.errors import HubError
from pipeline.hub_file import COMMIT, HubFile, RepoType, url_file
from pipeline.hub_listing import cached_file, cached_snapshots, listed
from pipeline.patience import Circuit
from pipeline.web import is_safe
from tasks.checkpoints import CheckpointError, describe_timm
from tasks.idx import write_idx
from tasks.images import FETCHED_FASHION_MNIST

# In this order of preference; the second is where some CLIP repositories keep theirs.
WEIGHTS_NAMES = ("model.safetensors", "open_clip_model.safetensors")
FASHION_MNIST_REPO = "zalando-datasets/fashion_mnist"
FASHION_MNIST_FILES = {
    "train": "fashion_mnist/train-00000-of-00001.parquet",
    "t10k": "fashion_mnist/test-00000-of-00001.parquet",
}
NUM_THREADS = 8  # names asked for at once: chosen


def resolve(name: str, *, revision: str | None = None) -> HubFile:
    """Find the weights of a pretrained timm model.

    Args:
        name: timm's name, with or without tag.
        revision: Commit, branch or tag; None for the newest. A full commit whose weights are in
            the cache is resolved without a request.

    Raises:
        HubError: If timm has no hub repository for the name, the hub cannot be asked, or the
            repository has no safetensors file.
    """
    try:
        config = timm.get_pretrained_cfg(describe_timm(name, identity="").name)
    except CheckpointError as error:
        raise HubError(str(error)) from error
    if config is None or not config.hf_hub_id:
        url = str((config and config.url) or "")
        file = url_file(url) if is_safe(url) else None
        if file is None:
            raise HubError(
                f"{name}: timm {timm.__version__} lists no hub repository for it, and no https "
                f"address of a file whose name ends in digits of its SHA-256 (found {url!r}). "
                "Download its weights by hand and audit them as a local checkpoint."
            )
        return file
    repo_id, _, pinned = config.hf_hub_id.partition("@")
    named = config.hf_hub_filename or ""
    filenames = (named,) if named.endswith(".safetensors") else WEIGHTS_NAMES
    return _locate(repo_id, filenames, revision or pinned or None)


def resolve_all(
    names: Sequence[tuple[str, str | None]], circuit: Circuit
) -> list[HubFile | HubError]:
    """Resolve many names at once, each with its revision; results in their order.

    When several in a row get no answer, the rest are not tried.
    """

    def one(item: tuple[str, str | None]) -> HubFile | HubError:
        name, revision = item
        try:
            return circuit.call(lambda: resolve(name, revision=revision), what=name)
        except HubError as error:
            return error

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(one, names))


def fetch_fashion_mnist(directory: Path | None = None) -> Path:
    """Fetch Fashion-MNIST and write it as the IDX files that ``tasks.images`` reads.

    Args:
        directory: Where to; None for the place where ``load_dataset`` looks by itself.

    Returns:
        The folder. If it holds all files already, nothing is requested.

    Raises:
        HubError: If the data cannot be had, or are not 28×28 grey images with labels.
    """
    directory = FETCHED_FASHION_MNIST if directory is None else Path(directory)
    for prefix, filename in FASHION_MNIST_FILES.items():
        images_path = directory / f"{prefix}-images-idx3-ubyte"
        labels_path = directory / f"{prefix}-labels-idx1-ubyte"
        if images_path.is_file() and labels_path.is_file():
            continue
        file = _locate(FASHION_MNIST_REPO, (filename,), None, repo_type="dataset")
        images, labels = _read_parquet(download(file))
        directory.mkdir(parents=True, exist_ok=True)
        for path, values in ((images_path, images), (labels_path, labels)):
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            write_idx(aside, values)
            os.replace(aside, path)
    return directory


def _locate(
    repo_id: str, filenames: tuple[str, ...], revision: str | None, *, repo_type: RepoType = "model"
) -> HubFile:
    """Find the first of these files that the repository has, in the cache if that suffices."""
    offline = constants.HF_HUB_OFFLINE
    if offline or (revision and COMMIT.fullmatch(revision)):
        cached = _cached(repo_id, filenames, revision, repo_type)
        if cached is not None:
            return cached
    if offline:
        raise HubError(
            f"{repo_id} at {revision or 'any revision'}: not in the cache "
            f"{constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set. Unset it, or fill the cache on "
            "a machine with network: flatcensus fetch",
            unasked=True,
        )
    what = f"{repo_id} at {revision}" if revision else repo_id
    files = {file.filename: file for file in listed(repo_id, revision, repo_type, what=what)}
    for filename in filenames:
        if filename in files:
            return files[filename]
    raise HubError(
        f"{what}: expected one of {', '.join(filenames)}, found "
        f"{', '.join(sorted(files)) or 'no files'}. Formats other than safetensors can execute "
        "code and are not loaded; choose another tag, or convert the weights."
    )


def _cached(
    repo_id: str, filenames: tuple[str, ...], revision: str | None, repo_type: RepoType
) -> HubFile | None:
    """The file in the cache: at this revision, or at the only one cached where none is given."""
    snapshots = cached_snapshots(repo_id, revision, repo_type)
    for filename in filenames:
        found = [f for s in snapshots if (f := cached_file(repo_id, s, filename, repo_type))]
        if len(found) > 1:
            raise HubError(
                f"{repo_id}: offline, and the cache holds {len(found)} revisions "
                f"({', '.join(sorted(s.name for s in snapshots))}). Set 'revision' to one of them."
            )
        if found:
            return found[0]
    return None


def _read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(path, columns=["image", "label"])
    images = [
        np.asarray(Image.open(io.BytesIO(image["bytes"])))
        for image in table.column("image").to_pylist()
    ]
    shapes = {(image.shape, image.dtype.name) for image in images}
    if shapes != {((28, 28), "uint8")}:
        raise HubError(f"{path}: expected grey images of 28×28, found {shapes}")
    return np.stack(images), table.column("label").to_numpy().astype(np.uint8)
