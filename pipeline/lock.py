"""Revisions of hub checkpoints that a run first saw, in ``hub.lock.json`` of its folder.

A repository on the hub can change under its name. A run keeps measuring the commit it began with,
unless the manifest names another ``revision``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from pipeline.errors import StoreError
from pipeline.store import Store
from tasks.checkpoints import CheckpointRef

LOCK = "hub.lock.json"


def locked_commits(store: Store) -> dict[str, str]:
    """Commits by full timm name. Raises StoreError if the file is damaged."""
    if not store.exists(LOCK):
        return {}
    try:
        found = json.loads(store.get(LOCK))
        return {str(name): str(commit) for name, commit in found.items()}
    except (ValueError, AttributeError) as error:
        raise StoreError(
            f"{store.uri}/{LOCK} is damaged ({error}). Expected a JSON object of model names and "
            "commits; restore it, or delete it to take the hub's current weights"
        ) from error


def lock_commits(refs: Iterable[CheckpointRef], store: Store) -> None:
    """Keep the commits of these references, unless the run has one of that name already."""
    from pipeline.hub import hub_file

    known = locked_commits(store)
    seen = {ref.name: hub_file(ref).commit for ref in refs if ref.source == "timm"}
    if seen.keys() - known.keys():
        store.put(LOCK, json.dumps({**seen, **known}, indent=1, sort_keys=True).encode())
