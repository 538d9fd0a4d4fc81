"""Checkpoints that a run has trained: whether their files are those that the training left.

The record of a training holds the SHA-256 of each file that it wrote. Weights that were damaged
since would be measured as if they were another checkpoint, so they are compared before.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.shard_file import set_aside, shard_key
from pipeline.shards import read_shards
from pipeline.specs import TRAINING_BLOCK
from pipeline.store import Store
from tasks.checkpoints import CheckpointError, CheckpointRef, describe_local, local_identity

_log = logging.getLogger(__name__)


def trained_files(store: Store, spec_keys: Collection[str]) -> dict[str, dict[str, str]]:
    """SHA-256 of the files that each committed training left, by key and the file's place."""
    if not spec_keys:
        return {}
    units = (shard.unit for shard in read_shards(store, spec_keys))
    return {unit.spec_key: unit.artifacts for unit in units if unit.status == "ok"}


def describe_trained(directory: Path, digests: Mapping[str, str]) -> CheckpointRef:
    """Describe a trained checkpoint.

    Raises:
        CheckpointError: Its files are gone, or not those that the training left.
    """
    ref = describe_local(directory)
    known = {Path(place).name: digest for place, digest in digests.items()}
    if known and ref.identity != local_identity(known["config.json"], known["model.safetensors"]):
        wrong = [p for p, digest in digests.items() if _digest(directory / Path(p).name) != digest]
        raise CheckpointError(f"{', '.join(sorted(wrong))}: not as the training left it")
    return ref


def train_again(store: Store, spec_key: str, reason: str) -> bool:
    """Set a training's result aside, so that it is done again; False if a pack holds it."""
    key = shard_key(spec_key, TRAINING_BLOCK)
    if not store.exists(key):
        return False
    moved = set_aside(store, key)
    _log.warning("%s. Its training is done again; %s was moved to %s", reason, key, moved)
    return True


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
