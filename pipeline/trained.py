"""Checkpoints that a run has trained: whether their files are those that the training left.

The record of a training holds the SHA-256 of each file that it wrote. Weights that were damaged
since would be measured as if they were another checkpoint, so they are compared before.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from pathlib import Path

from pipeline.shard_file import set_aside, shard_key
from pipeline.shards import read_shards
from pipeline.specs import TRAINING_BLOCK, checkpoint_folder
from pipeline.store import Store

_log = logging.getLogger(__name__)


def damaged_checkpoints(store: Store, spec_keys: Collection[str]) -> dict[str, str]:
    """What is wrong with the files of trained checkpoints, by key; sound ones are not in it."""
    found: dict[str, str] = {}
    if not spec_keys:
        return found
    for shard in read_shards(store, spec_keys):
        key, artifacts = shard.unit.spec_key, shard.unit.artifacts
        if shard.unit.status != "ok" or not artifacts:
            continue
        folder = store.local_folder(checkpoint_folder(key))
        wrong = sorted(
            name for name, digest in artifacts.items() if _digest(folder, name) != digest
        )
        if wrong:
            found[key] = f"{', '.join(wrong)}: not as the training left it"
    return found


def train_again(store: Store, spec_key: str, reason: str) -> bool:
    """Set a training's result aside, so that it is done again; False if a pack holds it."""
    key = shard_key(spec_key, TRAINING_BLOCK)
    if not store.exists(key):
        return False
    moved = set_aside(store, key)
    _log.warning("%s. Its training is done again; %s was moved to %s", reason, key, moved)
    return True


def _digest(folder: Path, name: str) -> str:
    """Of a file of the folder, wherever the record says that it was; empty if it is gone."""
    try:
        return hashlib.sha256((folder / Path(name).name).read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
