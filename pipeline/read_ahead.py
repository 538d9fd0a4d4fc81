"""Many small objects of a bucket, read ahead: one by one, each would wait for the network."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.local_store import LocalStore
from pipeline.store import Store

NUM_AHEAD = 16  # objects in flight or waiting for the reader: chosen


@contextlib.contextmanager
def read_ahead(store: Store, keys: Iterable[str]) -> Iterator[Callable[[str], bytes]]:
    """Gives ``store.get``, which finds these keys read already if they are asked for in order.

    Any other key, and one that is asked for again, is read when asked for. Directories are read
    as they are: threads would gain nothing.
    """
    if isinstance(store, LocalStore):
        yield store.get
        return
    coming = iter(keys)
    waiting: deque[tuple[str, Future[bytes]]] = deque()
    with ThreadPoolExecutor(NUM_AHEAD) as pool:

        def get(key: str) -> bytes:
            while len(waiting) < NUM_AHEAD and (following := next(coming, None)) is not None:
                waiting.append((following, pool.submit(store.get, following)))
            while any(name == key for name, _ in waiting):  # what was skipped is let go
                name, future = waiting.popleft()
                if name == key:
                    return future.result()
            return store.get(key)

        try:
            yield get
        finally:
            pool.shutdown(cancel_futures=True)
