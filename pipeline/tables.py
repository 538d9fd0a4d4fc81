"""Rows of a spec as columns: verified, each index once, in order.

Shards may overlap (a late duplicate, another unit size); each index then belongs to the first
shard that covers it, in the order of ranges, so that the same shards always give the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.shards import Shard, read_shards
from pipeline.store import Store
from tasks.measurement import STRIDE, Columns, Ranges


def spec_frame(shards: Sequence[Shard], ranges: Ranges | None) -> pd.DataFrame:
    """The rows of one spec's successful shards within ``ranges`` (None: all), each index once."""
    frames, covered = [], []
    good = [shard for shard in shards if shard.unit.status == "ok"]
    for shard in sorted(good, key=lambda s: (s.unit.start, s.unit.stop)):
        frame = shard.table.to_pandas()
        if shard.unit.kind == "measure":
            index = row_index(frame)
            keep = np.ones(len(frame), dtype=bool)
            for start, stop in covered:
                keep &= ~((index >= start) & (index < stop))
            if ranges is not None:
                keep &= np.logical_or.reduce(
                    [(index >= r.start) & (index < r.stop) for r in ranges]
                )
            frame, index = frame[keep], index[keep]
            frame = frame.assign(_index=index)
            covered = [c for c in covered if c[1] > shard.unit.start]
            covered.append((shard.unit.start, shard.unit.stop))
        else:
            frame = frame.assign(_index=np.arange(len(frame)))
        frames.append(frame)
    if not frames:
        return pd.DataFrame()
    joined = pd.concat(frames, ignore_index=True)
    joined = joined.sort_values("_index", kind="stable").drop(columns="_index")
    return joined.reset_index(drop=True)


def stage_columns(store: Store, spec_key: str, ranges: Ranges) -> Columns:
    """The rows of a spec within a stage's ranges, as measurements read them."""
    return frame_columns(spec_frame(list(read_shards(store, [spec_key])), ranges))


def frame_columns(frame: pd.DataFrame) -> Columns:
    """A data frame's columns as plain arrays (text as objects, missing numbers as NaN)."""
    columns = {}
    for name in frame.columns:
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(object)
        columns[name] = column.to_numpy()
    return columns


def row_index(frame: pd.DataFrame) -> np.ndarray:
    """Index of each row in its spec's index space; rows without a draw belong to draw 0."""
    draw = frame["draw"].fillna(0).to_numpy(dtype=np.int64)
    return draw * STRIDE + frame["sample"].to_numpy(dtype=np.int64)
