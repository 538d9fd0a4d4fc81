"""Files from the hub or the web into the cache of this machine, verified. Loads no torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import disable_progress_bars, logging

from pipeline import hub_cache
from pipeline.errors import HubError
from pipeline.hub_file import HubFile
from pipeline.patience import patiently
from pipeline.web import download_url

CORRUPT_TRIES = 3

# What is shown while files arrive, and what is said of requests, is ours: theirs names signed
# addresses, and bars of several downloads overwrite each other.
logging.set_verbosity_error()
if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
    disable_progress_bars()
# The Xet client waits without limit for a connection that stalls; plain requests give up after
# HF_HUB_DOWNLOAD_TIMEOUT and are resumed. HF_HUB_DISABLE_XET=0 asks for it all the same.
if "HF_HUB_DISABLE_XET" not in os.environ:
    constants.HF_HUB_DISABLE_XET = True


def download(file: HubFile) -> Path:
    """Fetch a file into the cache of this machine, or find it there.

    Processes that want one file wait for the first: huggingface_hub locks each.

    Returns:
        Path in the cache, with the right SHA-256 if that is known.

    Raises:
        HubError: If the file cannot be had, or keeps arriving with wrong bytes.
        StoreError: If it does not fit on the disk of the cache.
    """
    if hub_cache.cached(file) is None:
        hub_cache.require_space(file)
        hub_cache.remove_leftovers(file)
    if file.repo_type == "url":
        return download_url(file)
    for _ in range(CORRUPT_TRIES):
        path = Path(
            patiently(
                lambda: hf_hub_download(
                    file.repo_id, file.filename, revision=file.commit, repo_type=file.repo_type
                ),
                what=file.what,
            )
        )
        found = _sha256(path) if file.sha256 else None
        if found == file.sha256:
            return path
        path.resolve().unlink(missing_ok=True)  # the blob: a repeated download would reuse it
        path.unlink(missing_ok=True)
    raise HubError(
        f"{file.what}: expected sha256 {file.sha256}, received other bytes {CORRUPT_TRIES} times. "
        f"Something between here and {constants.ENDPOINT} changes the file; check proxies."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
