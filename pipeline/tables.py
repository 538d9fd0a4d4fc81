"""Rows of a spec as columns: verified, each sample and draw once, in order.

Shards may overlap (a late duplicate, another unit size); each pair then belongs to the first
shard that covers it, in the order of blocks, so that the same shards always give the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.shards import Quarantined, Shard, read_shards
from pipeline.store import Store
from tasks.block import Block
from tasks.measurement import Columns


def spec_frame(shards: Sequence[Shard], wanted: Block | None) -> pd.DataFrame:
    """The rows of one spec's successful shards within a block (None: all), each pair once."""
    frames, covered = [], []
    good = [shard for shard in shards if shard.unit.status == "ok"]
    for shard in sorted(good, key=lambda s: (s.unit.draw_start, s.unit.start, s.unit.stop)):
        frame = shard.table.to_pandas()
        if wanted is not None:
            keep = _inside(frame, wanted)
            for block in covered:
                if _overlap(block, shard.unit.block):
                    keep &= ~_inside(frame, block)
            frame = frame[keep]
            covered.append(shard.unit.block)
        frames.append(frame)
    if not frames:
        return pd.DataFrame()
    joined = pd.concat(frames, ignore_index=True)
    if wanted is None:
        return joined
    by_place = joined.assign(_draw=joined["draw"].fillna(0)).sort_values(
        ["_draw", "sample"], kind="stable"
    )
    return by_place.drop(columns="_draw").reset_index(drop=True)


def stage_columns(store: Store, spec_key: str, block: Block, damaged: list[Quarantined]) -> Columns:
    """The rows of a spec within a stage's block, as measurements read them.

    Shards that had to be set aside are missing from them, and join ``damaged``.
    """
    shards = list(read_shards(store, [spec_key], quarantined=damaged))
    return frame_columns(spec_frame(shards, block))


def frame_columns(frame: pd.DataFrame) -> Columns:
    """A data frame's columns as plain arrays (text as objects, missing numbers as NaN)."""
    columns = {}
    for name in frame.columns:
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(object)
        columns[name] = column.to_numpy()
    return columns


def _inside(frame: pd.DataFrame, block: Block) -> np.ndarray:
    """Which rows lie in a block; rows without a draw belong to draw 0."""
    draw, sample = frame["draw"].fillna(0).to_numpy(), frame["sample"].to_numpy()
    inside = (sample >= block.samples.start) & (sample < block.samples.stop)
    return inside & (draw >= block.draws.start) & (draw < block.draws.stop)


def _overlap(one: Block, other: Block) -> bool:
    return (
        one.samples.start < other.samples.stop
        and other.samples.start < one.samples.stop
        and one.draws.start < other.draws.stop
        and other.draws.start < one.draws.stop
    )
