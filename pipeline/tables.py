"""Rows of a spec as columns: verified, each sample and draw once, in order.

Shards may overlap (a late duplicate, another unit size); each pair then belongs to the first
shard that covers it, in the order of blocks, so that the same shards always give the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pipeline.shards import Found, Quarantined, read_found
from pipeline.store import Store
from tasks.block import Block
from tasks.measurement import Columns


def spec_frame(found: Found, wanted: Block | None) -> pd.DataFrame:
    """The rows of one spec's successful units within a block (None: all), each pair once."""
    units = found.units.select([*_BOUNDS, "num_rows", "status"]).to_pandas()
    good = units[units["status"] == "ok"].sort_values(list(_BOUNDS), kind="stable")
    if good.empty:
        return pd.DataFrame()
    frame = found.rows.to_pandas()
    first_rows = np.cumsum(units["num_rows"].to_numpy()) - units["num_rows"].to_numpy()
    counts = good["num_rows"].to_numpy()
    # Row numbers unit by unit, in the order of blocks; failed units have no rows.
    ends = np.cumsum(counts)
    order = np.arange(ends[-1]) + np.repeat(first_rows[good.index] - (ends - counts), counts)
    if wanted is None:
        return frame.iloc[order].reset_index(drop=True)
    draw = frame["draw"].fillna(0).to_numpy()[order]
    sample = frame["sample"].to_numpy()[order]
    keep = _inside(draw, sample, wanted)
    blocks = good[list(_BOUNDS)].to_numpy()
    for later, earlier in _overlaps(blocks):
        own = slice(ends[later] - counts[later], ends[later])
        for draw_start, start, stop, draw_stop in blocks[earlier]:
            block = Block(range(start, stop), range(draw_start, draw_stop))
            keep[own] &= ~_inside(draw[own], sample[own], block)
    order, draw, sample = order[keep], draw[keep], sample[keep]
    # By draw, then by sample; rows of one sample and draw stay as they were measured.
    return frame.iloc[order[np.lexsort((sample, draw))]].reset_index(drop=True)


def stage_columns(store: Store, spec_key: str, block: Block, damaged: list[Quarantined]) -> Columns:
    """The rows of a spec within a stage's block, as measurements read them.

    Shards that had to be set aside are missing from them, and join ``damaged``.
    """
    found = dict(read_found(store, [spec_key], quarantined=damaged)).get(spec_key)
    return frame_columns(pd.DataFrame() if found is None else spec_frame(found, block))


def frame_columns(frame: pd.DataFrame) -> Columns:
    """A data frame's columns as plain arrays (text as objects, missing numbers as NaN)."""
    columns = {}
    for name in frame.columns:
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(object)
        columns[name] = column.to_numpy()
    return columns


def _overlaps(blocks: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks that share pairs with earlier ones, and which those are.

    Blocks whose draws do not even touch through others, or else whose samples do not, are told
    apart by sorting, so that the usual case without overlap is not quadratic.
    """
    draw_start, start, stop, draw_stop = blocks.T
    shift = _chains(draw_start, draw_stop) * (stop.max() + 1)
    chains = _chains(start + shift, stop + shift)
    by_chain = np.argsort(chains, kind="stable")
    sizes = np.bincount(chains)
    ends = np.cumsum(sizes)
    for chain in np.flatnonzero(sizes > 1):
        members = by_chain[ends[chain] - sizes[chain] : ends[chain]]
        for place, later in enumerate(members):
            before = members[:place]
            shared = (start[before] < stop[later]) & (start[later] < stop[before])
            shared &= (draw_start[before] < draw_stop[later]) & (
                draw_start[later] < draw_stop[before]
            )
            if shared.any():
                yield int(later), before[shared]


def _chains(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Numbers of the groups of intervals that overlap, directly or through others."""
    order = np.argsort(start, kind="stable")
    reach = np.maximum.accumulate(stop[order])
    begins = np.append(False, start[order][1:] >= reach[:-1])
    chains = np.empty(len(start), dtype=np.int64)
    chains[order] = np.cumsum(begins)
    return chains


# In the order by which units go before others.
_BOUNDS = ("draw_start", "start", "stop", "draw_stop")


def _inside(draw: np.ndarray, sample: np.ndarray, block: Block) -> np.ndarray:
    """Which rows lie in a block; rows without a draw belong to draw 0."""
    inside = (sample >= block.samples.start) & (sample < block.samples.stop)
    return inside & (draw >= block.draws.start) & (draw < block.draws.stop)
