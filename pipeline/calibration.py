"""How well predicted costs fit the machines of a run: factors from its finished units.

Predictions never change a number, so a few records, read without checking their digests, will do.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from pipeline.shards import ShardName, peek_record
from pipeline.store import Store

MAX_RECORDS = 50  # records read for a plan: chosen, a few hundredths of a second
MIN_RECORDS = 4  # below, quantiles say nothing
UNMEASURED = (1 / 3, 1.0, 3.0)  # predictions on a machine nobody has measured are that good


def finished_units(
    store: Store, keys: Collection[str], present: Mapping[str, Sequence[ShardName]]
) -> Iterator[tuple[float, float]]:
    """(predicted, measured) seconds of up to ``MAX_RECORDS`` successful units of these specs."""
    names = [n for key in sorted(keys) for n in present.get(key, ()) if n.generation is None]
    step = max(1, -(-len(names) // MAX_RECORDS))
    for name in names[step // 2 :: step]:
        record = peek_record(store, name.key)
        if record is not None and record.predicted_seconds is not None:
            yield record.predicted_seconds, record.seconds


def calibrate(measured: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Low, middle and high factor between predicted and measured seconds of a sum of units.

    The middle is the ratio of the sums, so that long units weigh as they cost; the range is that of
    the middle 80 % of single units, and at least contains the middle.
    """
    pairs = [(p, m) for p, m in measured if p > 0 and m > 0]
    if len(pairs) < MIN_RECORDS:
        return UNMEASURED
    middle = sum(m for _, m in pairs) / sum(p for p, _ in pairs)
    low, *_, high = statistics.quantiles([m / p for p, m in pairs], n=10)
    return min(low, middle), middle, max(high, middle)
