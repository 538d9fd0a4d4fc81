"""Weights that are on no hub: a file at an https address whose name ends in its SHA-256's digits.

The download is resumed where it broke, also after its process was killed, and the digits of the
name are checked at the end. Requests carry no token.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, get_session

from pipeline.errors import HubError
from pipeline.hub_cache import place
from pipeline.hub_file import HubFile
from pipeline.patience import patiently

CORRUPT_TRIES = 3
CHUNK_BYTES = 2**20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_safe(url: str) -> bool:
    """Whether an address is https, or on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)


def download_url(file: HubFile) -> Path:
    """Fetch a file from its web address into the cache, or find it there.

    Raises:
        HubError: If it cannot be had, or its bytes are not those that its name states.
        StoreError: If the disk of the cache is full.
    """
    target, host = place(file), urlsplit(file.url).netloc
    if not is_safe(file.url):
        raise HubError(f"{file.url}: expected an https address; nothing else is fetched")
    if target.is_file() and _is_right(target, file):
        return target
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{file.url}: not in the cache {target.parent}, and HF_HUB_OFFLINE is set. Unset it, "
            "or fill the cache on a machine with network: flatcensus fetch",
            unasked=True,
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubError(
            f"{file.url}: cannot write to the cache {target.parent} ({error}). Correct its "
            "permissions, or set HF_HOME to another folder."
        ) from error
    part = target.with_name(f"{target.name}.part")
    with WeakFileLock(target.with_name(f".{target.name}.lock")):
        if target.is_file() and _is_right(target, file):  # by another process in the meantime
            return target
        for _ in range(CORRUPT_TRIES):
            patiently(lambda: _append(file.url, part), what=file.url, host=host)
            if _is_right(part, file):
                os.replace(part, target)
                return target
            part.unlink()
    raise HubError(
        f"{file.url}: expected bytes whose SHA-256 starts with {file.commit}, as its name says, "
        f"received others {CORRUPT_TRIES} times. Something between here and {host} changes the "
        "file; check proxies."
    )


def _append(url: str, part: Path) -> None:
    """Fetch what a partial file still lacks."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if not is_safe(str(response.url)):
            raise HubError(f"{url}: leads to an address that is not https; it is not fetched")
        if response.status_code == 416:  # nothing follows what is here; the digits will tell
            return
        response.raise_for_status()
        # A server that ignores the range begins anew.
        with part.open("ab" if response.status_code == 206 else "wb") as file:
            for chunk in response.iter_bytes(CHUNK_BYTES):
                file.write(chunk)


def _is_right(path: Path, file: HubFile) -> bool:
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    return found.startswith(file.sha256 or file.commit)
