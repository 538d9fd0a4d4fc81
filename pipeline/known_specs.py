"""What the keys of a run stand for, in ``specs/`` of its folder, and what has changed since.

Each launch that brings new keys adds one file with a line for each of them. An older flatcensus
wrote one file per key; those are read as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pydantic

from pipeline.plan import Plan
from pipeline.specs import Spec
from pipeline.store import Store

SPEC_FOLDER = "specs"
_ADDED = f"{SPEC_FOLDER}/added-"
_LINE = re.compile(rb'^"([^"/]+)": (\{.*\}),?$', re.MULTILINE)


def write_specs(specs: Iterable[Spec], store: Store) -> None:
    """Keep what each key stands for, so that later plans can say what changed."""
    names = store.list(f"{SPEC_FOLDER}/")
    known = {name.removeprefix(f"{SPEC_FOLDER}/").removesuffix(".json") for name in names}
    for name in names:
        if name.startswith(_ADDED):
            known.update(match[1].decode() for match in _LINE.finditer(store.get(name)))
    new = {spec.key: spec for spec in specs if spec.key not in known}
    if not new:
        return
    lines = [f"{json.dumps(key)}: {json.dumps(_record(spec))}" for key, spec in new.items()]
    content = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    store.put_new(f"{_ADDED}{hashlib.sha256(content).hexdigest()[:24]}.json", content)


def stale_lines(plan: Plan, store: Store) -> list[str]:
    """For results that the manifest no longer asks for: which field differs from what it asks."""
    if not plan.stale:
        return []
    twins: dict[tuple[str, str], list[Spec]] = defaultdict(list)
    for item in plan.specs:
        twins[item.spec.checkpoint, item.spec.metric].append(item.spec)
    known, lines = dict(_known_specs(store, set(plan.stale))), []
    for key in plan.stale:
        if (old := known.get(key)) is None:
            lines.append(f"shards/{key}: results of unknown settings, kept and not used")
            continue
        what = f"{old.checkpoint} {old.metric}" + (f"@{old.label}" if old.label else "")
        found = twins[old.checkpoint, old.metric]
        twin = next((t for t in found if t.label == old.label), found[0] if found else None)
        changes = _differences(old.fields, twin.fields) if twin else ["no longer in the manifest"]
        lines.append(f"stale: {what} ({'; '.join(changes)}); kept and not used")
    return lines


class _KnownSpec(pydantic.BaseModel):
    """What is kept of a spec."""

    checkpoint: str
    metric: str
    label: str
    fields: dict[str, Any]


def _record(spec: Spec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in _KnownSpec.model_fields}


def _known_specs(store: Store, keys: Collection[str]) -> Iterator[tuple[str, _KnownSpec]]:
    """What these keys stand for; nothing for one that nobody wrote down or that is damaged."""
    for name in store.list(f"{SPEC_FOLDER}/"):
        if name.startswith(_ADDED):
            found = [(match[1].decode(), match[2]) for match in _LINE.finditer(store.get(name))]
        else:
            key = name.removeprefix(f"{SPEC_FOLDER}/").removesuffix(".json")
            found = [(key, store.get(name))] if key in keys else []
        for key, content in found:
            if key in keys and (spec := _read(content)) is not None:
                yield key, spec


def _read(content: bytes) -> _KnownSpec | None:
    try:
        return _KnownSpec.model_validate_json(content)
    except pydantic.ValidationError:
        return None


def _differences(old: object, new: object, path: str = "") -> list[str]:
    """``measurement.tolerance 0.001 -> 0.01`` for every field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            where = f"{path}.{key}" if path else str(key)
            found += _differences(old.get(key), new.get(key), where)
        return found
    return [] if old == new else [f"{path} {_short(old)} -> {_short(new)}"]


def _short(value: object) -> str:
    text = str(value)
    # Identities begin alike and end in what differs.
    return text if len(text) <= 40 else f"{text[:12]}...{text[-25:]}"
