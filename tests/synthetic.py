"""A measurement for tests of the pipeline: layers, checks, a note and a cost, all known."""

from __future__ import annotations

from typing import ClassVar

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
