"""Everything that a launch needs from the hub, into the cache of this machine, ahead of it.

Files that are complete are kept and not asked for again. huggingface_hub throws the half of a file
away whose process was killed; within a process a broken connection is resumed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlsplit

from huggingface_hub import constants

from pipeline.download import download
from pipeline.entries import Manifest
from pipeline.errors import FlatcensusError, StoreError
from pipeline.hub_cache import cached
from pipeline.hub_file import HubFile
from pipeline.hub_names import find_images, find_weights
from pipeline.lock import Lock
from pipeline.patience import Circuit
from tasks.checkpoints import CheckpointError, describe_timm
from tasks.outline import outline

NUM_THREADS = 4  # downloads at once: chosen; a hub's server sends faster to several

State = Literal["cached", "to fetch", "fetched", "failed"]


@dataclass(frozen=True)
class Wanted:
    """One checkpoint's weights, or one split of a data set.

    Attributes:
        name: The checkpoint or split.
        files: Its files; empty where the hub could not say.
        num_bytes: Their size, None where it is not known.
        is_estimate: Whether the size is a guess from the network's parameters and buffers.
        state: What is the case, or was done.
        reason: Why it failed.
    """

    name: str
    files: tuple[HubFile, ...]
    num_bytes: int | None
    is_estimate: bool
    state: State
    reason: str = ""

    @property
    def repository(self) -> str:
        """Where the files come from."""
        return self.files[0].repo_id if self.files else ""


def survey(manifest: Manifest, lock: Lock) -> list[Wanted]:
    """What a launch of the manifest needs, and whether the cache has it. Fetches nothing."""
    wanted = []
    for weights in find_weights(manifest, lock):
        if isinstance(weights.file, HubFile):
            wanted.append(_known(weights.name, (weights.file,)))
        else:
            size = _estimate(weights.name)
            reason = str(weights.file)
            wanted.append(Wanted(weights.name, (), size, size is not None, "failed", reason))
    for images in find_images(manifest, lock):
        if isinstance(images.files, tuple):
            wanted.append(_known(images.name, images.files))
        else:
            wanted.append(Wanted(images.name, (), None, False, "failed", str(images.files)))
    return wanted


def fetch(
    wanted: Sequence[Wanted], done: Callable[[Wanted], None]
) -> tuple[list[Wanted], StoreError | None]:
    """Download what is to fetch, several at once, and check what is cached.

    Args:
        wanted: From ``survey``.
        done: Hears of each as it ends, in this thread.

    Returns:
        The same in the same order with their states now; the error that stopped it, if the disk
        is full. What was not begun then is still to fetch.
    """
    results, full = list(wanted), None
    for index, result in _in_threads([(i, w) for i, w in enumerate(wanted) if w.files]):
        if isinstance(result, StoreError):
            full = full or result
            continue
        results[index] = result
        done(result)
    return results, full


def _in_threads(
    items: Sequence[tuple[int, Wanted]],
) -> Iterator[tuple[int, Wanted | StoreError]]:
    todo: queue.SimpleQueue[tuple[int, Wanted]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[int, Wanted | StoreError] | Exception] = queue.SimpleQueue()
    full, circuits = threading.Event(), dict[str | None, Circuit]()
    for item in items:
        todo.put(item)

    def work() -> None:
        while True:
            try:
                index, item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                ended.put((index, item if full.is_set() else _fetched(item, circuits)))
            except StoreError as error:
                full.set()
                ended.put((index, error))
            except Exception as error:  # a border: the thread must not die in silence
                ended.put(error)

    for _ in range(min(NUM_THREADS, len(items))):
        # Daemons: an interrupted command ends at once, and leaves their downloads.
        threading.Thread(target=work, daemon=True).start()
    for _ in items:
        answer = ended.get()
        if isinstance(answer, Exception):
            raise answer
        yield answer


def _fetched(item: Wanted, circuits: dict[str | None, Circuit]) -> Wanted:
    paths = []
    try:
        for file in item.files:
            # One for each server: that one of them is silent says nothing of the others.
            host = urlsplit(file.url).netloc if file.repo_type == "url" else None
            circuit = circuits.setdefault(host, Circuit(host=host))
            paths.append(circuit.call(lambda file=file: download(file), what=file.what))
    except StoreError:
        raise
    except FlatcensusError as error:
        return replace(item, state="failed", reason=str(error))
    return replace(
        item,
        num_bytes=sum(path.stat().st_size for path in paths),
        state="cached" if item.state == "cached" else "fetched",
    )


def _known(name: str, files: tuple[HubFile, ...]) -> Wanted:
    sizes = [file.size for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    state, reason = "to fetch", ""
    if all(map(cached, files)):
        state = "cached"
    elif constants.HF_HUB_OFFLINE:
        state, reason = "failed", "not in the cache, and HF_HUB_OFFLINE is set"
    return Wanted(name, files, total, False, state, reason)


def _estimate(name: str) -> int | None:
    try:
        return outline(describe_timm(name, identity="")).weight_bytes
    except CheckpointError:
        return None
