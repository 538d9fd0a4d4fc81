"""Writers that race for the keys of a store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from pipeline.store import Store


def require_one_winner_per_key(store: Store, *, num_writers: int, num_keys: int) -> None:
    """Let all writers create each key at one moment: one of them does, and its data is there."""
    start = Barrier(num_writers)

    def write(writer: int) -> list[bool]:
        won = []
        for key in range(num_keys):
            start.wait()
            won.append(store.put_new(f"race/{key}", b"%d" % writer))
        return won

    with ThreadPoolExecutor(num_writers) as pool:
        won = list(pool.map(write, range(num_writers)))
    for key in range(num_keys):
        winners = [writer for writer in range(num_writers) if won[writer][key]]
        assert len(winners) == 1
        assert store.get(f"race/{key}") == b"%d" % winners[0]
