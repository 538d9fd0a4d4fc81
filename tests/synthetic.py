"""A measurement and shards for tests of the pipeline: layers, checks, a cost, all known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.pack_file import GROUP_UNITS, PackWriter
from pipeline.packs import publish
from pipeline.schema import MEASUREMENT_SCHEMA, Constants, UnitRecord
from pipeline.shard_file import ShardName, encode_shard, name_of, shard_key
from pipeline.store import Store
from pipeline.unit_table import record_table
from tasks.block import Block
from tasks.measurement import Check, Columns, Estimate, Measurement, Row, Subject
from tasks.outline import Outline
from tasks.sample_mean import sample_mean

LAYERS = ("stem", "head")


class Layered(Measurement):
    """The sample's number, for the network and ten and twenty times that for its two layers.

    Attributes:
        theorem_fails: Report a theorem that fails although its conditions are met.
        cost: Forward-equivalents per sample.
        group: Alignment of units.
    """

    metric: ClassVar[str] = "layered"
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = ("size",)
    coverage_fields: ClassVar[frozenset[str]] = frozenset({"cost", "group"})

    theorem_fails: bool = False
    cost: float = 1.0
    group: int = 1

    @property
    def alignment(self) -> int:
        return self.group

    def stages(self, num_samples: int, available: int) -> list[Block]:
        return [Block(range(num_samples))]

    def finished(self, rows: Columns) -> bool:
        return True

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        rows = []
        for sample in block.samples:
            rows.append(Row("size", float(sample), sample=sample))
            rows += [
                Row("layer_size", 10.0 * i * sample, sample=sample, layer=layer)
                for i, layer in enumerate(LAYERS, start=1)
            ]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        layer_wise = []
        for i, layer in enumerate(LAYERS, start=1):
            inside = rows["layer"] == layer
            value = float(rows["value"][inside].mean())
            layer_wise.append(
                Estimate("layer_size", value, 0.1 * i, value - i, value + i, int(inside.sum()),
                         int(inside.sum()), layer=layer)
            )  # fmt: skip
        return [sample_mean(rows, "size"), *layer_wise]

    def checks(self, rows: Columns) -> list[Check]:
        count, nan = int((rows["quantity"] == "size").sum()), float("nan")
        left = 1000.0 if self.theorem_fails else 1.0
        return [
            Check("11", "printed", 100.0, 10.0, False, False, True, "none", count),
            Check("11", "untied", left, 10.0, left <= 10, True, True, "none", count),
            Check("12b", "", nan, nan, None, True, False, "0 is an input on 1 image", count),
            *(Check("48", "", 1.0, 100.0, True, True, True, "", count, layer=x) for x in LAYERS),
        ]

    def forward_equivalents(self, network: Outline) -> float:
        return self.cost

    def note(self, network: Outline) -> str:
        return f"{network.num_outputs} rows at once"


def fill_with_shards(
    store: Store,
    num_units: int,
    *,
    units_per_spec: int = 100,
    rows_per_unit: int = 16,
    seed: int = 0,
    spec_keys: Sequence[str] = (),
) -> list[ShardName]:
    """Write many small shards quickly: real bytes, made-up numbers, nothing flushed to disk.

    Args:
        store: A run folder on this machine's disk.
        num_units: How many.
        units_per_spec: Units of ``rows_per_unit`` samples each that one spec has.
        rows_per_unit: Rows of each.
        seed: Of the numbers.
        spec_keys: Names of the specs; made up where they are missing.
    """
    rng, names = np.random.default_rng(seed), []
    root, constants = (
        Path(store.uri),
        Constants(metric_version=1, code_version="0", torch_version="0", timm_version="0"),
    )
    for number in range(num_units):
        spec, place = divmod(number, units_per_spec)
        key = spec_keys[spec] if spec < len(spec_keys) else f"{spec:024x}"
        samples = range(place * rows_per_unit, (place + 1) * rows_per_unit)
        values = rng.standard_normal(rows_per_unit).tolist()
        rows = [Row("size", v, sample=s) for s, v in zip(samples, values, strict=True)]
        record = _record(key, spec, number, samples)
        path = root / shard_key(key, record.block)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_shard(rows, record, constants))
        names.append(name_of(record))
    return names


def fill_with_packs(
    store: Store, num_units: int, *, units_per_spec: int = 100, rows_per_unit: int = 16
) -> None:
    """The same units as ``fill_with_shards`` gives, in packs and in a fraction of the time."""
    rng = np.random.default_rng(0)
    writer = PackWriter()
    for first in range(0, num_units, GROUP_UNITS):
        numbers = range(first, min(num_units, first + GROUP_UNITS))
        values = rng.standard_normal((len(numbers), rows_per_unit))
        records, keys = [], []
        for number in numbers:
            spec, place = divmod(number, units_per_spec)
            samples = range(place * rows_per_unit, (place + 1) * rows_per_unit)
            keys.append((f"{spec:024x}", f"network{spec}"))
            records.append(_record(keys[-1][0], spec, number, samples))
        writer.add_group(record_table(records), _rows(keys, records, values))
        if writer.is_full:
            publish(store, writer.finish())
            writer = PackWriter()
    if writer.num_units:
        publish(store, writer.finish())


def _rows(keys: list[tuple[str, str]], records: list[UnitRecord], values: np.ndarray) -> pa.Table:
    """All rows of these units as one table."""
    num_rows = values.shape[1]
    same = {
        "family": "mlp", "metric": "layered", "label": "", "metric_version": 1,
        "code_version": "0", "torch_version": "0", "timm_version": "0", "quantity": "size",
        "status": "ok", "num_iterations": 0, "num_probes": 0, "forward_equivalents": 0.0,
        "seconds": 0.0,
    }  # fmt: skip
    columns: dict[str, object] = {
        "spec_key": np.repeat([key for key, _ in keys], num_rows),
        "checkpoint": np.repeat([name for _, name in keys], num_rows),
        "sample": np.concatenate([np.arange(r.start, r.stop) for r in records]),
        "value": values.ravel(),
    }
    arrays = []
    for field in MEASUREMENT_SCHEMA:
        text = pa.types.is_dictionary(field.type)
        plain = field.type.value_type if text else field.type
        if field.name in columns:
            array = pa.array(columns[field.name], type=plain)
        else:
            array = pa.repeat(pa.scalar(same.get(field.name), type=plain), values.size)
        arrays.append(array.dictionary_encode() if text else array)
    return pa.table(arrays, schema=MEASUREMENT_SCHEMA)


def _record(key: str, spec: int, number: int, samples: range) -> UnitRecord:
    return UnitRecord(
        spec_key=key, start=samples.start, stop=samples.stop, checkpoint=f"network{spec}",
        family="mlp", metric="layered", label="", host="machine", device="cpu x86_64",
        pid=4000 + number % 7, threads=1, batch_size=16, num_rows=len(samples),
        started_at="2026-01-01T00:00:00.000+00:00", finished_at="2026-01-01T00:01:00.000+00:00",
        seconds=60.0 + number % 11, predicted_seconds=60.0, cpu_seconds=59.0, load_seconds=0.5,
        self_tested=False, peak_bytes=10**9, versions={"torch": "2", "flatcensus": "0"},
    )  # fmt: skip
