"""Units: what is to do of each spec, cut into pieces of about ``unit_seconds``, made when needed.

A plan of a million units is a few numbers per spec. How many units a group has and how long they
take follows from the grid that they are cut on; the units themselves are made one by one.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pipeline.cost import Rates, block_work, slot_share
from pipeline.entries import ResourceSpec
from pipeline.specs import Spec, Task
from tasks.block import Block


@dataclass(frozen=True)
class Terms:
    """What all units of a plan share: the manifest's seed and resources, the store, the rates."""

    seed: int
    store: str
    resources: ResourceSpec
    rates: Rates

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where units run."""
        return "cuda" if self.resources.num_gpus > 0 else "cpu"

    def seconds(self, spec: Spec, block: Block) -> float:
        """Predicted seconds of a unit."""
        return self.rates.seconds(
            block_work(spec, block, self.resources.batch_size),
            num_images=0 if spec.entry is None else len(block.samples),
            share=slot_share(self.resources),
        )


@dataclass(frozen=True)
class UnitGroup:
    """The units of one spec, alike but for their blocks.

    Attributes:
        spec: What they measure.
        gaps: What is to do.
        wanted: The block that the grid of cuts belongs to.
        size: Pairs of sample and draw per unit.
        terms: What the units of a plan share.
        generation: Number of the failure record that one of them would leave.
        predicted_bytes: Peak memory of each; None where it is not predicted.
    """

    spec: Spec
    gaps: tuple[Block, ...]
    wanted: Block
    size: int
    terms: Terms
    generation: int = 0
    predicted_bytes: int | None = None

    def __len__(self) -> int:
        """Number of units, without making them."""
        return sum(self._shapes.values())

    def __iter__(self) -> Iterator[Task]:
        """The units in order, made one by one."""
        terms, seconds = self.terms, self._seconds
        for gap in self.gaps:
            for piece in split(gap, self.size, self.wanted):
                yield Task(
                    spec=self.spec, block=piece, seed=terms.seed, store=terms.store,
                    batch_size=terms.resources.batch_size, threads=terms.resources.num_cpus,
                    device=terms.device,
                    predicted_seconds=seconds[len(piece.samples), len(piece.draws)],
                    predicted_bytes=self.predicted_bytes, generation=self.generation,
                )  # fmt: skip

    @property
    def predicted_seconds(self) -> float:
        """Sum over the units, in seconds of one slot."""
        return sum(count * self._seconds[shape] for shape, count in self._shapes.items())

    @property
    def longest_seconds(self) -> float:
        """Of a single unit."""
        return max(self._seconds.values(), default=0.0)

    @cached_property
    def _shapes(self) -> Counter[tuple[int, int]]:
        """How many units have so many samples and draws: a few shapes however many units."""
        found: Counter[tuple[int, int]] = Counter()
        at_once, width = _grid(self.size, self.wanted)
        for gap in self.gaps:
            draws, samples = _lengths(gap.draws, at_once), _lengths(gap.samples, width)
            for (s, n), (d, m) in itertools.product(samples.items(), draws.items()):
                found[s, d] += n * m
        return found

    @cached_property
    def _seconds(self) -> dict[tuple[int, int], float]:
        """Predicted seconds of a unit of each shape."""
        return {
            (s, d): self.terms.seconds(self.spec, Block(range(s), range(d)))
            for s, d in self._shapes
        }


@dataclass(frozen=True)
class Units:
    """The units of a plan, in its order."""

    groups: tuple[UnitGroup, ...] = ()

    def __len__(self) -> int:
        """Number of units, without making them."""
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[Task]:
        """The units in order, made one by one."""
        return itertools.chain.from_iterable(self.groups)

    def __getitem__(self, index: int) -> Task:
        """One unit, counted from 0; makes those of its group that come before it."""
        for group in self.groups:
            if 0 <= index < len(group):
                return next(itertools.islice(group, index, None))
            index -= len(group)
        raise IndexError(f"there are only {len(self)} units")

    @property
    def predicted_seconds(self) -> float:
        """Sum over the units, in seconds of one slot."""
        return sum(group.predicted_seconds for group in self.groups)


def unit_size(spec: Spec, per_index: float, resources: ResourceSpec) -> int:
    """Pairs of sample and draw per unit: about ``unit_seconds`` of work, whole batches and groups.

    Where one batch takes longer than that, a unit is a part of a batch that tiles it, and of whole
    groups still: a crash must not cost hours because the batch size leaves much to do at once.

    Depends on the manifest and on nominal rates alone, never on what was measured, so that a
    resumed run cuts the same units.
    """
    if spec.entry is None:
        return 1
    align, batch = spec.alignment, math.lcm(spec.alignment, resources.batch_size)
    fitting = int(resources.unit_seconds / per_index)
    if fitting >= batch:
        return fitting // batch * batch
    parts = (size for size in range(align, fitting + 1, align) if batch % size == 0)
    return max(parts, default=align)


def split(gap: Block, size: int, wanted: Block) -> Iterator[Block]:
    """Cut a gap at multiples of ``size`` samples, or of whole draws where several fit into a unit.

    Cuts lie on a grid that depends on the wanted block alone, so gaps of any shape are cut alike.
    """
    at_once, width = _grid(size, wanted)
    for draws in _cut(gap.draws, at_once):
        for samples in _cut(gap.samples, width):
            yield Block(samples, draws)


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
