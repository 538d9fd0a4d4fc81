"""What is wanted minus what is there: arithmetic on ranges of samples and blocks of draws."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator

from tasks.block import Block


def missing_blocks(wanted: Block, have: Iterable[Block]) -> list[Block]:
    """The (sample, draw) pairs of ``wanted`` that ``have`` lacks, as few blocks in order.

    Draws between two boundaries of ``have`` are alike, so each such band needs one pass over the
    ranges that reach into it; measurements without draws have a single band.
    """
    samples: dict[range, list[range]] = defaultdict(list)
    for block in have:
        samples[block.draws].append(block.samples)
    if not samples:
        return [wanted] if len(wanted) else []
    first, last = wanted.draws.start, wanted.draws.stop
    # Blocks of equal draws are joined once, however many bands they reach into.
    pending = sorted(
        (draws.start, draws.stop, _joined(ranges))
        for draws, ranges in samples.items()
        if draws.start < last and first < draws.stop
    )
    edges = {first, last, *(e for a, b, _ in pending for e in (a, b) if first < e < last)}
    found: list[Block] = []
    before: list[range] = []
    active: list[tuple[int, list[range]]] = []
    position = 0
    for start, stop in itertools.pairwise(sorted(edges)):
        while position < len(pending) and pending[position][0] <= start:
            active.append(pending[position][1:])
            position += 1
        active = [item for item in active if item[0] > start]
        lacking = missing([wanted.samples], itertools.chain.from_iterable(r for _, r in active))
        if found and lacking == before and found[-1].draws.stop == start:
            begin = found[-1].draws.start
            found[-len(lacking) :] = [Block(samples, range(begin, stop)) for samples in lacking]
        else:
            found += [Block(samples, range(start, stop)) for samples in lacking]
        before = lacking
    return found


def without(blocks: Iterable[Block], have: Iterable[Block]) -> list[Block]:
    """The parts of some blocks that others do not cover."""
    others = list(have)
    return [piece for block in blocks for piece in missing_blocks(block, others)]


def missing(wanted: Iterable[range], have: Iterable[range]) -> list[range]:
    """The wanted indices that ``have`` lacks, as the fewest ranges, in order.

    Both may overlap and come in any order; all ranges have step 1. O(n log n).
    """
    found: list[range] = []
    covered: Iterator[range] = iter(_joined(have))
    here = next(covered, None)
    for whole in _joined(wanted):
        start, stop = whole.start, whole.stop
        while start < stop:
            while here is not None and here.stop <= start:
                here = next(covered, None)
            if here is None or here.start >= stop:
                found.append(range(start, stop))
                break
            if here.start > start:
                found.append(range(start, here.start))
            start = here.stop
    return found


def _joined(ranges: Iterable[range]) -> list[range]:
    """The same indices in order, as the fewest ranges."""
    found: list[range] = []
    pairs = sorted((r.start, r.stop) for r in ranges if r)
    if not pairs:
        return found
    start, stop = pairs[0]
    for a, b in pairs:
        if a > stop:
            found.append(range(start, stop))
            start, stop = a, b
        elif b > stop:
            stop = b
    found.append(range(start, stop))
    return found
