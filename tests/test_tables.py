"""Rows of a spec: each sample and draw once, from the first block that covers it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import fill_with_shards

from pipeline.schema import MEASUREMENT_SCHEMA, UnitRecord
from pipeline.shards import Found, read_found
from pipeline.store import open_store
from pipeline.tables import spec_frame
from pipeline.unit_table import record_table
from tasks.block import Block

WANTED = Block(range(2, 11), range(4))
BLOCKS = st.lists(
    st.tuples(
        st.integers(0, 12), st.integers(1, 6), st.integers(0, 4), st.integers(1, 3), st.booleans()
    ),
    max_size=12,
)


def found_in(blocks: list[tuple[int, int, int, int, bool]]) -> Found:
    """Two rows for each pair of each block; values name the block. Some blocks failed."""
    records, lines = [], []
    for number, (start, length, draw, draws, is_ok) in enumerate(blocks):
        pairs = [(s, d) for d in range(draw, draw + draws) for s in range(start, start + length)]
        lines += [
            {"quantity": q, "sample": s, "draw": d, "value": float(number)}
            for s, d in pairs if is_ok
            for q in ("one", "two")
        ]  # fmt: skip
        failure = None if is_ok else {"class": "memory", "type": "E", "message": "m"}
        records.append(
            UnitRecord(
                spec_key="s", start=start, stop=start + length, draw_start=draw,
                draw_stop=draw + draws, checkpoint="c", metric="m", label="", host="h",
                device="cpu", pid=1, threads=1, started_at="", finished_at="", seconds=1.0,
                num_rows=2 * len(pairs) if is_ok else 0, status="ok" if is_ok else "failed",
                failure=failure,  # pyright: ignore[reportArgumentType]
            )
        )  # fmt: skip
    same = {
        "spec_key": "s", "checkpoint": "c", "metric": "m", "label": "", "metric_version": 1,
        "code_version": "0", "torch_version": "0", "status": "ok", "num_iterations": 0,
        "num_probes": 0, "forward_equivalents": 0.0, "seconds": 0.0,
    }  # fmt: skip
    rows = pa.Table.from_pylist([same | line for line in lines], schema=MEASUREMENT_SCHEMA)
    return Found(record_table(records), rows)


@settings(max_examples=25, deadline=None)
@given(blocks=BLOCKS)
def test_each_pair_belongs_to_the_first_block_that_covers_it(blocks):
    frame = spec_frame(found_in(blocks), WANTED)
    good = [(draw, start, start + n, draw + m, i) for i, (start, n, draw, m, ok) in
            enumerate(blocks) if ok]  # fmt: skip
    expected = []
    for draw in WANTED.draws:
        for sample in WANTED.samples:
            owners = [b for b in sorted(good) if b[1] <= sample < b[2] and b[0] <= draw < b[3]]
            if owners:
                # Of equal blocks the first one that was listed.
                expected += [(draw, sample, q, float(owners[0][4])) for q in ("one", "two")]
    found = [] if frame.empty else list(
        frame[["draw", "sample", "quantity", "value"]].itertuples(index=False, name=None)
    )  # fmt: skip
    assert found == expected


def test_rows_are_the_same_whether_or_not_a_block_is_wanted(tmp_path):
    store = open_store(tmp_path)
    fill_with_shards(store, 6, units_per_spec=6, rows_per_unit=4)
    ((_, found),) = read_found(store)
    everything = spec_frame(found, None)
    pd.testing.assert_frame_equal(spec_frame(found, Block(range(24))), everything)
    assert list(everything["sample"]) == list(range(24))
    assert not np.isnan(everything["value"]).any()
