"""Units: what is to do of each spec, cut into pieces of about ``unit_seconds``, made when needed.

A plan of a million units is a few numbers per spec. How many units a group has and how long they
take follows from the grid that they are cut on; the units themselves are made one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pipeline.cost import Rates, block_work, seconds_per_index, slot_share, unit_bytes
from pipeline.entries import ResourceSpec
from pipeline.grid import shapes, split
from pipeline.specs import Spec, Task
from tasks.block import Block

_T = TypeVar("_T")


@dataclass(frozen=True)
class Terms:
    """What all units of a plan share: the manifest's seed and resources, the store, the rates.

    What they predict is the same for all specs of one network and measurement, and kept.
    """

    seed: int
    store: str
    resources: ResourceSpec
    rates: Rates
    itemsize: int = 4
    _known: dict[tuple[int, ...], tuple[Any, Spec]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where units run."""
        return "cuda" if self.resources.num_gpus > 0 else "cpu"

    def group(
        self, spec: Spec, gaps: Sequence[Block], wanted: Block, *, generation: int = 0
    ) -> UnitGroup:
        """What is to do of a spec, to be cut into units."""
        return UnitGroup(
            spec=spec, gaps=tuple(gaps), wanted=wanted, size=self._once(spec, (), self._size),
            terms=self, generation=generation,
            predicted_bytes=self._once(spec, (0,), self._bytes),
        )  # fmt: skip

    def seconds(self, spec: Spec, num_samples: int, num_draws: int) -> float:
        """Predicted seconds of a unit."""

        def predict(spec: Spec) -> float:
            return self.rates.seconds(
                block_work(
                    spec, Block(range(num_samples), range(num_draws)), self.resources.batch_size
                ),
                num_images=0 if spec.entry is None else num_samples,
                share=slot_share(self.resources),
            )

        return self._once(spec, (num_samples, num_draws), predict)

    def _size(self, spec: Spec) -> int:
        return unit_size(spec, seconds_per_index(spec, self.resources), self.resources)

    def _bytes(self, spec: Spec) -> int | None:
        return unit_bytes(spec, self.resources.batch_size, self.itemsize)

    def _once(self, spec: Spec, what: tuple[int, ...], predict: Callable[[Spec], _T]) -> _T:
        """What is predicted for a network and a measurement, or a training."""
        key = (id(spec.network), id(spec.entry), id(spec.train), *what)
        if key not in self._known:
            self._known[key] = predict(spec), spec  # which keeps alive what the key names
        return self._known[key][0]


@dataclass(frozen=True, slots=True)
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
        terms = self.terms
        for gap in self.gaps:
            for piece in split(gap, self.size, self.wanted):
                yield Task(
                    spec=self.spec, block=piece, seed=terms.seed, store=terms.store,
                    batch_size=terms.resources.batch_size, threads=terms.resources.num_cpus,
                    device=terms.device,
                    predicted_seconds=self._seconds(len(piece.samples), len(piece.draws)),
                    predicted_bytes=self.predicted_bytes, generation=self.generation,
                )  # fmt: skip

    @property
    def predicted_seconds(self) -> float:
        """Sum over the units, in seconds of one slot."""
        return sum(count * self._seconds(*shape) for shape, count in self._shapes.items())

    @property
    def longest_seconds(self) -> float:
        """Of a single unit."""
        return max((self._seconds(*shape) for shape in self._shapes), default=0.0)

    @property
    def _shapes(self) -> Mapping[tuple[int, int], int]:
        return shapes(self.gaps, self.size, self.wanted)

    def _seconds(self, num_samples: int, num_draws: int) -> float:
        return self.terms.seconds(self.spec, num_samples, num_draws)


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
