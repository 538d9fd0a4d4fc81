"""The specs of a run as its last launch resolved them, in ``resolved.json`` of its folder.

With it ``status``, ``query``, ``correlate`` and ``report`` need the run folder alone: no weights,
no images, no hub. It is a memory, not an authority: planning and launching always resolve anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from pipeline.entries import DataSpec, Manifest
from pipeline.errors import StoreError
from pipeline.hub_file import UNLOCKED
from pipeline.shards import shard_key
from pipeline.specs import TRAINING_BLOCK, Resolved, Spec, TrainedRef, Unresolved
from pipeline.store import Store
from tasks.checkpoints import CheckpointRef
from tasks.outline import LayerOutline, Outline

FROZEN = "resolved.json"


def freeze(resolved: Resolved, manifest: Manifest, store: Store) -> None:
    """Keep the specs of a manifest in the run folder."""
    identities = [spec.data_identity for spec in resolved.specs]
    identities += [spec.ref.identity for spec in resolved.specs if spec.ref is not None]
    assert not any(i.startswith(UNLOCKED) for i in identities), "a plan's specs are no run's"
    known = {
        "manifest": _digest(manifest),
        "specs": [_spec_record(spec, manifest) for spec in resolved.specs],
        "unresolved": [asdict(item) for item in resolved.unresolved],
        "untrained": [
            {"train": manifest.train.index(ref.entry), "spec_key": ref.spec_key}
            for ref in resolved.untrained
        ],
    }
    store.put(FROZEN, json.dumps(known, indent=1).encode())


def thaw(manifest: Manifest, store: Store) -> Resolved | None:
    """The specs that ``freeze`` kept, or None if they are not those of this run as it is now.

    Raises:
        StoreError: The file is not what ``freeze`` wrote.
    """
    if not store.exists(FROZEN):
        return None
    try:
        return _thawed(json.loads(store.get(FROZEN)), manifest, store)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise StoreError(
            f"{store.uri}/{FROZEN} is damaged ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Delete it: the next launch or resume writes it again"
        ) from error


def _thawed(known: dict[str, Any], manifest: Manifest, store: Store) -> Resolved | None:
    trained = any(
        store.exists(shard_key(item["spec_key"], TRAINING_BLOCK)) for item in known["untrained"]
    )
    if known["manifest"] != _digest(manifest) or trained:
        return None
    return Resolved(
        specs=tuple(_spec(record, manifest) for record in known["specs"]),
        unresolved=tuple(Unresolved(**item) for item in known["unresolved"]),
        untrained=tuple(
            TrainedRef(manifest.train[item["train"]], item["spec_key"])
            for item in known["untrained"]
        ),
    )


def _spec_record(spec: Spec, manifest: Manifest) -> dict[str, Any]:
    """A spec as JSON values; what the manifest says is kept as its place there."""
    plain = ("key", "kind", "checkpoint", "family", "tag", "metric", "label", "fields",
             "data_identity", "available", "num_samples")  # fmt: skip
    return {
        **{name: getattr(spec, name) for name in plain},
        "ref": None if spec.ref is None else spec.ref.model_dump(mode="json"),
        "measurement": None if spec.entry is None else manifest.measurements.index(spec.entry),
        "train": None if spec.train is None else manifest.train.index(spec.train),
        "data": spec.data.model_dump(mode="json", exclude_unset=True),
        "network": asdict(spec.network),
    }


def _spec(record: dict[str, Any], manifest: Manifest) -> Spec:
    measurement, train = record.pop("measurement"), record.pop("train")
    return Spec(
        **{
            **record,
            "ref": None if record["ref"] is None else CheckpointRef(**record["ref"]),
            "entry": None if measurement is None else manifest.measurements[measurement],
            "train": None if train is None else manifest.train[train],
            "data": DataSpec(**record["data"]),
            "network": _outline(record["network"]),
        }
    )


def _outline(record: dict[str, Any]) -> Outline:
    layers = tuple(LayerOutline(**layer) for layer in record.get("layers", ()))
    return Outline(**{**record, "layers": layers})


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.text.encode()).hexdigest()
