"""The grid that units are cut on: pieces of a block, and how many there are without making them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache

from tasks.block import Block


def split(gap: Block, size: int, wanted: Block) -> Iterator[Block]:
    """Cut a gap at multiples of ``size`` samples, or of whole draws where several fit into a unit.

    Cuts lie on a grid that depends on the wanted block alone, so gaps of any shape are cut alike.
    """
    at_once, width = _grid(size, wanted)
    for draws in _cut(gap.draws, at_once):
        for samples in _cut(gap.samples, width):
            yield Block(samples, draws)


@lru_cache(maxsize=4096)  # most specs of a run want, or lack, the same
def shapes(gaps: tuple[Block, ...], size: int, wanted: Block) -> Mapping[tuple[int, int], int]:
    """How many pieces have so many samples and draws: a few shapes however many units."""
    found: Counter[tuple[int, int]] = Counter()
    at_once, width = _grid(size, wanted)
    for gap in gaps:
        draws, samples = _lengths(gap.draws, at_once), _lengths(gap.samples, width)
        for (s, n), (d, m) in itertools.product(samples.items(), draws.items()):
            found[s, d] += n * m
    return found


def _grid(size: int, wanted: Block) -> tuple[int, int]:
    """Draws and samples between two cuts."""
    return max(1, size // len(wanted.samples)), min(size, len(wanted.samples))


def _cut(whole: range, size: int) -> Iterator[range]:
    start = whole.start
    while start < whole.stop:
        stop = min(whole.stop, (start // size + 1) * size)
        yield range(start, stop)
        start = stop


def _lengths(whole: range, size: int) -> Counter[int]:
    """How many pieces of each length ``_cut`` makes: a first, whole ones, a last."""
    first, last = -(-whole.start // size), whole.stop // size
    if first > last:  # within one cell of the grid
        return Counter([len(whole)])
    found = Counter({size: last - first} if last > first else {})
    ends = (first * size - whole.start, whole.stop - last * size)
    found.update(length for length in ends if length)
    return found
