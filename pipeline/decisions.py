"""Which stages of sequential measurements suffice: what ``finished`` said, kept in the run folder.

Asking it takes all rows of a stage, so a scheduler that starts again would read most shards before
its first unit. ``decisions.json`` spares that. It is a memory, not an authority: before a launch
ends it asks anew, and tables never rest on it.
"""

from __future__ import annotations

import json

from pipeline.store import Store

# ``finished`` by spec key, measurement (twins share a key but not their targets) and stage.
Decisions = dict[tuple[str, str, int], bool]

DECISIONS = "decisions.json"


def keep_decisions(decisions: Decisions, store: Store) -> None:
    """Write the decisions down."""
    settings = {text: i for i, text in enumerate(dict.fromkeys(text for _, text, _ in decisions))}
    known = {
        "settings": list(settings),
        "decisions": [
            [key, settings[text], stage, finished]
            for (key, text, stage), finished in decisions.items()
        ],
    }
    store.put(DECISIONS, json.dumps(known, separators=(",", ":")).encode())


def recall_decisions(store: Store) -> Decisions:
    """What ``keep_decisions`` wrote; nothing if it did not or if that is damaged."""
    if not store.exists(DECISIONS):
        return {}
    try:
        known = json.loads(store.get(DECISIONS))
        return {
            (str(key), str(known["settings"][place]), int(stage)): finished is True
            for key, place, stage, finished in known["decisions"]
        }
    except (ValueError, KeyError, TypeError, IndexError):
        return {}
