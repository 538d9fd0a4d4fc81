"""The results of campaigns, one JSON line per episode, as a table by kind of fault."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from campaigns.episodes import Episode

HEADS = (
    "fault", "faults", "runs", "rows lost", "rows duplicated", "units lost", "units recomputed",
    "median recovery (s)", "worst recovery (s)", "worst until a lost unit was done (s)",
)  # fmt: skip


def keep(episode: Episode, path: Path) -> None:
    """Append an episode."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(episode)) + "\n")


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Episodes of several campaigns."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def markdown(episodes: Sequence[dict[str, Any]]) -> str:
    """The table, with a line of totals and a sentence on launches and violations."""
    by_kind: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for episode in episodes:
        for fault in episode["faults"]:
            by_kind[fault["kind"]].append((episode, fault))
    lines = [_line(name, by_kind[name]) for name in sorted(by_kind)]
    lines.append(_line("**all**", [pair for pairs in by_kind.values() for pair in pairs]))
    table = [HEADS, ["---", *["---:"] * (len(HEADS) - 1)], *lines]
    text = "\n".join(f"| {' | '.join(line)} |" for line in table)
    launches = sum(episode["launches"] for episode in episodes)
    bad = [episode for episode in episodes if episode["violations"]]
    hours = sum(episode["seconds"] for episode in episodes) / 3600
    end = (
        f"{len(episodes)} runs, {launches} launches, {hours:.1f} h; "
        f"{len(bad)} runs broke a promise{''.join(_seed(e) for e in bad)}."
    )
    return f"{text}\n\n{end}"


def _line(name: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    episodes = {(e["place"], e["seed"]): e for e, _ in pairs}.values()
    came = [f["came"] for _, f in pairs]  # [[recomputed, lost], recovery, again]
    waits = sorted(seconds for _, seconds, _ in came if seconds is not None)
    again = [seconds for *_, seconds in came if seconds is not None]
    return [
        name,
        str(len(pairs)),
        str(len(episodes)),
        str(sum(e["rows"][0] for e in episodes)),
        str(sum(e["rows"][1] for e in episodes)),
        str(sum(lost for (_, lost), *_ in came)),
        f"{sum(recomputed for (recomputed, _), *_ in came):g}",
        f"{statistics.median(waits):.1f}" if waits else "–",
        f"{waits[-1]:.1f}" if waits else "–",
        f"{max(again):.1f}" if again else "–",
    ]


def _seed(episode: dict[str, Any]) -> str:
    return f" (--place {episode['place']} --seed {episode['seed']} --episodes 1)"
