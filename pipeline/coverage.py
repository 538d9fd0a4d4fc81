"""What is wanted minus what is there: arithmetic on ranges of samples and blocks of draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from tasks.block import Block


def missing_blocks(wanted: Block, have: Iterable[Block]) -> list[Block]:
    """The (sample, draw) pairs of ``wanted`` that ``have`` lacks, as few blocks in order.

    Draws between two boundaries of ``have`` are alike, so each such band needs one pass over the
    ranges; measurements without draws have a single band.
    """
    have = [block for block in have if _overlap(block.draws, wanted.draws)]
    edges = {wanted.draws.start, wanted.draws.stop}
    edges.update(e for b in have for e in (b.draws.start, b.draws.stop) if e in wanted.draws)
    found: list[Block] = []
    before: list[range] = []
    cuts = sorted(edges)
    for start, stop in itertools.pairwise(cuts):
        lacking = missing([wanted.samples], (b.samples for b in have if start in b.draws))
        if found and lacking == before and found[-1].draws.stop == start:
            first = found[-1].draws.start
            found[-len(lacking) :] = [Block(samples, range(first, stop)) for samples in lacking]
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

    Both may overlap and come in any order; all ranges have step 1. O(n log n), vectorised.
    """
    want, got = _bounds(wanted), _bounds(have)
    if not want.size:
        return []
    # Each boundary changes by one how many ranges cover the points from there on.
    points = np.concatenate([want.ravel(), got.ravel()])
    order = np.argsort(points, kind="stable")
    is_wanted = np.repeat([1, 0], [want.size, got.size])
    change = np.tile([1, -1], len(want) + len(got))
    wanted_depth = np.cumsum((is_wanted * change)[order])
    have_depth = np.cumsum(((1 - is_wanted) * change)[order])
    points = points[order]
    # Of the boundaries at one point only the last one's depth counts.
    last = np.append(points[1:] != points[:-1], True)
    points, lacking = points[last], ((wanted_depth > 0) & (have_depth == 0))[last]
    edges = points[np.flatnonzero(np.diff(lacking, prepend=False))].tolist()
    return [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _bounds(ranges: Iterable[range]) -> np.ndarray:
    """Starts and stops of the non-empty ranges, (n, 2)."""
    pairs = [(r.start, r.stop) for r in ranges if r]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
