"""Batches of a range of samples that do not depend on where the range begins or ends."""

from __future__ import annotations

from collections.abc import Iterator


def aligned_batches(samples: range, size: int) -> Iterator[range]:
    """Cut a range at multiples of the batch size, so that its ends do not move the batches.

    Args:
        samples: Positions in the frozen order, step 1.
        size: Images per batch.

    Yields:
        Ranges of at most ``size`` samples, in order, that cover ``samples``.
    """
    start = samples.start
    while start < samples.stop:
        stop = min((start // size + 1) * size, samples.stop)
        yield range(start, stop)
        start = stop
