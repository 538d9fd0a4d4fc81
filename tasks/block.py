"""A rectangle of work. Apart from the mathematics, so that readers of shards need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """These samples with each of these weight draws.

    ``samples`` are positions in the frozen, seeded order of the data set. Measurements without
    random weight draws only use draw 0.
    """

    samples: range
    draws: range = range(1)

    def __len__(self) -> int:
        """Number of (sample, draw) pairs."""
        return len(self.samples) * len(self.draws)
