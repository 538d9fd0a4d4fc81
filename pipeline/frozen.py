"""The specs of a run as its last launch resolved them, in ``resolved.json`` of its folder.

With it ``status``, ``query``, ``correlate`` and ``report`` need the run folder alone: no weights,
no images, no hub. It is a memory, not an authority: planning and launching always resolve anew.

Many specs say the same (one network under ten measurements, ten networks of one architecture), so
each value is written once, in ``values``, and a spec is a list of its places there: first those of
``columns``, then those of its ``fields``, whose names are the last of ``columns``. Stages, settings
and the size of units follow from the rest; they are there for ``pipeline.standing``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from pipeline.cost import seconds_per_index
from pipeline.entries import DataSpec, Manifest
from pipeline.errors import StoreError
from pipeline.hub_file import UNLOCKED
from pipeline.sealed import FROZEN, seal, unseal
from pipeline.shards import any_done, list_shards
from pipeline.specs import Resolved, Spec, TrainedRef, Unresolved
from pipeline.store import Store
from pipeline.units import unit_size
from pipeline.versions import code_version
from tasks.checkpoints import CheckpointRef
from tasks.outline import LayerOutline, Outline

__all__ = ["FROZEN", "freeze", "thaw"]


def freeze(resolved: Resolved, manifest: Manifest, store: Store) -> None:
    """Keep the specs of a manifest in the run folder."""
    identities = [spec.data_identity for spec in resolved.specs]
    identities += [spec.ref.identity for spec in resolved.specs if spec.ref is not None]
    assert not any(i.startswith(UNLOCKED) for i in identities), "a plan's specs are no run's"
    writer = _Writer(manifest)
    known = {
        "manifest": _digest(manifest),
        "code": code_version(),
        "columns": _COLUMNS,
        "specs": [writer.record(spec) for spec in resolved.specs],
        "values": writer.values,
        "unresolved": [asdict(item) for item in resolved.unresolved],
        "untrained": [
            {"train": writer.trainings[id(ref.entry)], "spec_key": ref.spec_key}
            for ref in resolved.untrained
        ],
    }
    store.put(FROZEN, seal(known))


def thaw(manifest: Manifest, store: Store) -> Resolved | None:
    """The specs that ``freeze`` kept, or None if they are not those of this run as it is now.

    Raises:
        StoreError: The file is not what ``freeze`` wrote.
    """
    if not store.exists(FROZEN):
        return None
    try:
        return _thawed(unseal(store.get(FROZEN)), manifest, store)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise StoreError(
            f"{store.uri}/{FROZEN} is damaged ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Delete it: the next launch or resume writes it again"
        ) from error


def _thawed(known: dict[str, Any], manifest: Manifest, store: Store) -> Resolved | None:
    untrained = [item["spec_key"] for item in known["untrained"]]
    if known["manifest"] != _digest(manifest) or any_done(list_shards(store, untrained), untrained):
        return None
    known = _as_lists(known)
    reader = _Reader(manifest, known["values"])
    return Resolved(
        specs=tuple(reader.spec(record) for record in known["specs"]),
        unresolved=tuple(Unresolved(**item) for item in known["unresolved"]),
        untrained=tuple(
            TrainedRef(manifest.train[item["train"]], item["spec_key"])
            for item in known["untrained"]
        ),
    )


# Of a spec as it is, and what has a place in ``values``.
_OWN = ("key", "checkpoint")
_SHARED = (
    "kind", "family", "tag", "metric", "label", "data_identity", "available", "num_samples",
    "stored", "ref", "data", "network",
)  # fmt: skip
_DERIVED = ("stages", "settings", "unit size")
_COLUMNS = (*_OWN, *_SHARED, "measurement", "train", *_DERIVED, "names of fields")


class _Writer:
    """Specs as lists; what the manifest says is kept as its place there."""

    def __init__(self, manifest: Manifest) -> None:
        self.measurements = {id(entry): i for i, entry in enumerate(manifest.measurements)}
        self.trainings = {id(entry): i for i, entry in enumerate(manifest.train)}
        self.values: list[Any] = []
        self.places: dict[str, int] = {}  # of a value, by its JSON
        self.known: dict[int, int] = {}  # of a value, by the object that it was made of
        self.derived: dict[tuple[int, ...], list[int]] = {}
        self.resources = manifest.resources

    def record(self, spec: Spec) -> list[Any]:
        return [
            spec.key,
            spec.checkpoint,
            *(self.place(getattr(spec, name)) for name in _SHARED),
            None if spec.entry is None else self.measurements[id(spec.entry)],
            None if spec.train is None else self.trainings[id(spec.train)],
            *self._derived(spec),
            self._place(list(spec.fields)),
            *map(self.place, spec.fields.values()),
        ]

    def place(self, value: Any) -> int:
        """Where a part of a spec is in ``values``; the specs keep it alive meanwhile."""
        if id(value) not in self.known:
            self.known[id(value)] = self._place(_plain(value))
        return self.known[id(value)]

    def _derived(self, spec: Spec) -> list[int]:
        """Places of what follows from network, measurement and numbers of images."""
        alike = id(spec.network), id(spec.entry), id(spec.train), spec.num_samples, spec.available
        if alike not in self.derived:
            size = unit_size(spec, seconds_per_index(spec, self.resources), self.resources)
            stages = [
                [b.samples.start, b.samples.stop, b.draws.start, b.draws.stop]
                for b in spec.stages()
            ]
            settings = "" if spec.entry is None else spec.entry.measurement.model_dump_json()
            self.derived[alike] = [self._place(part) for part in (stages, settings, size)]
        return self.derived[alike]

    def _place(self, value: Any) -> int:
        text = json.dumps(value)
        if text not in self.places:
            self.places[text] = len(self.values)
            self.values.append(value)
        return self.places[text]


def _plain(value: Any) -> Any:
    """A value of a spec as JSON has it."""
    if isinstance(value, CheckpointRef):
        return value.model_dump(mode="json")
    if isinstance(value, DataSpec):
        return value.model_dump(mode="json", exclude_unset=True)
    return asdict(value) if isinstance(value, Outline) else value


class _Reader:
    """Specs of their records; equal parts become one object."""

    def __init__(self, manifest: Manifest, values: list[Any]) -> None:
        self.manifest, self.values = manifest, values
        self.made: dict[tuple[str, int], Any] = {}

    def spec(self, record: list[Any]) -> Spec:
        row = dict(zip(_COLUMNS, record, strict=False))
        measurement, train = row["measurement"], row["train"]
        names = self.values[row["names of fields"]]
        return Spec(
            **{name: row[name] for name in _OWN},
            **{name: self.part(name, row[name]) for name in _SHARED},
            fields=dict(
                zip(names, map(self.values.__getitem__, record[len(_COLUMNS) :]), strict=True)
            ),
            entry=None if measurement is None else self.manifest.measurements[measurement],
            train=None if train is None else self.manifest.train[train],
        )

    def part(self, name: str, place: int) -> Any:
        """What a spec has under this name."""
        if (name, place) not in self.made:
            value = self.values[place]
            self.made[name, place] = _MAKERS[name](value) if name in _MAKERS else value
        return self.made[name, place]


def _as_lists(known: dict[str, Any]) -> dict[str, Any]:
    """The same as it is written now, of an older flatcensus, which wrote every spec in full."""
    if "values" in known:
        return known
    specs: list[list[Any]] = []
    values: list[Any] = []

    def places(found: Iterable[Any]) -> list[int]:
        before = len(values)
        values.extend(found)
        return list(range(before, len(values)))

    for record in known["specs"]:
        fields = record["fields"]
        specs.append(
            [
                *(record[name] for name in _OWN),
                *places(record.get(name) for name in _SHARED),
                record["measurement"],
                record["train"],
                *(None for _ in _DERIVED),
                *places([list(fields), *fields.values()]),
            ]
        )
    return {**known, "specs": specs, "values": values}


def _outline(record: dict[str, Any]) -> Outline:
    layers = tuple(LayerOutline(**layer) for layer in record.get("layers", ()))
    return Outline(**{**record, "layers": layers})


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "ref": lambda value: None if value is None else CheckpointRef(**value),
    "data": lambda value: DataSpec(**value),
    "network": _outline,
}


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.text.encode()).hexdigest()
